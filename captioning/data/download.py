"""Download the images and captions of COCO. All of 2017 is 19 GB of zips, 38 GB during unzipping:

    python -m captioning.data.download --year 2017 --root data/coco

As a small start, add `--first 2000`: the captions and only the first 2000 images of each split.
The command can be interrupted at any time: run again, it resumes and skips what is complete.
"""

import argparse
import json
import os
import re
import shutil
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import requests
from tqdm import tqdm

from captioning.base.files import write_text
from captioning.data.coco import read_captions

BASE_URL, YEARS = "http://images.cocodataset.org", (2014, 2017)
TRIES, TIMEOUT, BACKOFF = 5, 30, 1.0  # attempts per file, seconds without data, seconds between
MAX_BYTES, MAX_RATIO = 2**36, 30  # of a zip's content, and that divided by the zip's size


class DownloadError(RuntimeError):
    """A failed download; the message names the problem and a remedy in one sentence."""


def download_coco(root, year=2017, first=None, base_url=BASE_URL):
    """Download COCO to `root`; returns {"train": (image folder, captions file), "val": ..}.

    These are root/train2017 and root/annotations/captions_train2017.json. Given `first`, only that
    many images of each split, those with the lowest ids, are downloaded, one by one instead of as
    a zip, and the captions file is captions_train2017.first2000.json, written last. `base_url` may
    be a mirror. Raises DownloadError, or ValueError for bad arguments or captions.
    """
    if year not in YEARS or (first is not None and first < 1):
        raise ValueError(f"{year=}, {first=}: the years of COCO are {YEARS}, first is at least 1")
    args = Path(root), year, first, base_url.rstrip("/")
    try:
        return {split: _download_split(f"{split}{year}", *args) for split in ("train", "val")}
    except OSError as error:
        raise DownloadError(f"{error}; free disk space and run again, it resumes") from error


def _download_split(name, root, year, first, base_url):
    folder, captions_file = root / name, root / f"annotations/captions_{name}.json"
    if not captions_file.exists():
        unzip(fetch(f"{base_url}/annotations/annotations_trainval{year}.zip", root), root)
    captions = read_captions(captions_file).dataset
    if first is None:
        if _absent(captions, folder):
            unzip(fetch(f"{base_url}/zips/{name}.zip", root), root)
        if _absent(captions, folder):
            raise DownloadError(f"{base_url} lacks images of {captions_file}: try a mirror")
        return folder, captions_file
    captions["images"] = sorted(captions["images"], key=lambda image: image["id"])[:first]
    ids = {image["id"] for image in captions["images"]}
    captions["annotations"] = [a for a in captions["annotations"] if a["image_id"] in ids]
    urls = [f"{base_url}/{name}/{file_name}" for file_name in _absent(captions, folder)]
    with ThreadPoolExecutor(max_workers=8) as pool:  # after an error or Ctrl-C, starts no more
        list(tqdm(pool.map(partial(fetch, folder=folder), urls), name, len(urls), disable=None))
    captions_file = captions_file.with_suffix(f".first{first}.json")
    write_text(captions_file, json.dumps(captions))
    return folder, captions_file


def _absent(captions, folder):
    """Names of images that are not in `folder`. Files there are complete: they are renamed last."""
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return [im["file_name"] for im in captions["images"] if im["file_name"] not in present]


def fetch(url, folder):
    """Download `url` to `folder`; returns the path, which appears only when complete.

    Until then, the data is in `path.part`. A later attempt, in this call or another, requests only
    the rest, provided that the server's ETag or date (stored in `path.part.tag`) is unchanged.
    """
    path = folder / Path(url).name
    part, tag_file = Path(f"{path}.part"), Path(f"{path}.part.tag")
    if path.exists():
        return path
    for attempt in range(TRIES):
        time.sleep(BACKOFF * (2**attempt - 1))
        try:
            _append(url, part, tag_file)
        except ValueError as error:  # of requests, if an address or a redirect is not http
            raise DownloadError(f"{url!r} is refused ({error}): check the base url") from error
        except requests.RequestException as error:
            reason = error
        else:
            os.replace(part, path)
            tag_file.unlink()
            return path
    problem = f"{url} could not be downloaded in {TRIES} attempts ({reason})"
    raise DownloadError(f"{problem}: check the network and run again, {part} will be resumed")


def _append(url, part, tag_file):
    """One attempt: append to `part` what is missing, or start it again.

    Raises requests.RequestException for temporary failures, DownloadError for permanent ones.
    """
    tag = tag_file.read_text(encoding="latin-1") if tag_file.exists() else ""
    offset = part.stat().st_size if tag and part.exists() else 0
    headers = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    headers["Accept-Encoding"] = "identity"
    with requests.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
        status, headers = response.status_code, response.headers
        if status != 206:  # no support for ranges, or the file has changed
            offset = 0
        size = offset + int(headers.get("Content-Length", 0))
        etag = headers.get("ETag", "")  # a weak one, W/"...", does not identify bytes
        new_tag = etag if etag.startswith('"') else headers.get("Last-Modified", "")
        expected = (tag, f"bytes {offset}-{size - 1}/{size}")
        answer = (new_tag, headers.get("Content-Range"))
        if status == 416 or (status == 206 and answer != expected):
            part.unlink(missing_ok=True)
            raise requests.RequestException("the server sent another range or another version")
        if 400 <= status < 500 and status not in (408, 429):
            raise DownloadError(f"{url} failed with {status}: check the year and the base url")
        response.raise_for_status()
        kind = headers.get("Content-Type", "")
        if size == offset or size > MAX_BYTES or kind.startswith("text/html"):
            problem = f"{url} has {size:,} bytes of type {kind!r}, the limit is {MAX_BYTES:,}"
            raise DownloadError(f"{problem}: check the address, or sign in to the network")
        part.parent.mkdir(parents=True, exist_ok=True)
        small = size < 2**25 or None  # None: a progress bar if the output is a terminal
        with open(part, "ab" if offset else "wb") as file:
            # After open(), so that the tag never describes bytes of an earlier version.
            tag_file.write_text(new_tag, encoding="latin-1")
            bar = {"total": size, "initial": offset, "desc": part.stem, "disable": small}
            with tqdm.wrapattr(file, "write", **bar) as out:
                for chunk in response.iter_content(2**14):  # a lost connection loses one chunk
                    out.write(chunk)
    if part.stat().st_size != size:
        raise requests.RequestException(f"received {part.stat().st_size:,} of {size:,} bytes")


def unzip(path, folder):
    """Extract the zip at `path` to `folder`, then delete it.

    Members are extracted to a hidden folder and renamed into place after all of them have passed
    their CRC: files in `folder` are complete at any time. Other files there are kept.
    """
    scratch = folder / f".{path.name}.unzipping"  # on the same disk as its destination
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if not 0 < size <= min(MAX_BYTES, MAX_RATIO * path.stat().st_size):
                raise ValueError(f"{size:,} bytes are none or too many")
            for member in tqdm(archive.infolist(), path.name, disable=None):
                if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){0,8}/?", member.filename):
                    raise ValueError(f"{member.filename!r} may lead outside the folder")
                archive.extract(member, scratch)  # links as text files
        shutil.copytree(scratch, folder, copy_function=os.replace, dirs_exist_ok=True)
        path.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise DownloadError(f"{path} is not a valid zip ({error}): delete it, run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="Download COCO images and captions.")
    parser.add_argument("--year", type=int, default=2017, choices=YEARS)
    parser.add_argument("--root", default="data/coco", help="folder for the dataset")
    parser.add_argument("--first", type=int, metavar="N", help="only N images of each split")
    parser.add_argument("--base-url", default=BASE_URL, help="a mirror of COCO's server")
    try:
        for split, paths in download_coco(**vars(parser.parse_args())).items():
            print(f"{split}:", *paths)
    except (DownloadError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: run the same command again to resume") from None


if __name__ == "__main__":
    main()
