"""Download the images and captions of COCO. All of 2017 is 19 GB of zips, 38 GB during unzipping:

    python download.py --year 2017 --root data/coco

As a small start, the captions and only the first 2000 images of each split:

    python download.py --year 2017 --root data/coco --first 2000

The command can be interrupted at any time: run again, it resumes and skips what is complete.
`root` then contains train2017/*.jpg, val2017/*.jpg and annotations/captions_train2017.json etc.
With `--first N` it also contains captions_train2017.firstN.json, written last, for the N images
with the lowest ids.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from captioning.base.files import write_text

BASE_URL = "http://images.cocodataset.org"
YEARS, SPLITS = (2014, 2017), ("train", "val")


class DownloadError(RuntimeError):
    """A failed download; the message names the problem and a remedy in one sentence."""


def download_coco(root, year=2017, splits=SPLITS, first=None, base_url=BASE_URL, **options):
    """Download COCO to `root`; returns {split: (image folder, captions file)}.

    first: download that many single images of each split, from their `coco_url`, instead of the
        zip; the captions file returned contains only these.
    base_url: a mirror, which also replaces scheme and host of every `coco_url`.
    options: for `fetch`: tries, timeout, backoff.

    Raises DownloadError, or ValueError for a year or a split that COCO does not have.
    """
    if year not in YEARS or not set(splits) <= set(SPLITS) or (first is not None and first < 1):
        raise ValueError(f"{year=}, {splits=}, {first=}: COCO has {YEARS}, {SPLITS}, first >= 1")
    root, base_url = Path(root), base_url.rstrip("/")

    def fetch_and_unzip(name):
        unzip(fetch(f"{base_url}/{name}", root / Path(name).name, **options), root)

    files = {split: root / f"annotations/captions_{split}{year}.json" for split in splits}
    if not all(captions_file.exists() for captions_file in files.values()):
        fetch_and_unzip(f"annotations/annotations_trainval{year}.zip")
    dataset = {}
    for split, captions_file in files.items():
        folder, captions = root / f"{split}{year}", _read_captions(captions_file, first)
        if first is not None:
            captions_file = captions_file.with_suffix(f".first{first}.json")
            _fetch_images(captions, folder, captions_file, base_url, options)
        elif _absent(captions, folder):
            fetch_and_unzip(f"zips/{split}{year}.zip")
            if _absent(captions, folder):
                raise DownloadError(f"{base_url} lacks images of {captions_file}: try a mirror")
        dataset[split] = (folder, captions_file)
    return dataset


def _read_captions(path, first):
    """The content of a captions file, restricted to the `first` images ordered by id."""
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
        images = sorted(captions["images"], key=lambda image: image["id"])[:first]
        for image in images:
            if not re.fullmatch(r"[\w-]+\.jpg", image["file_name"]):  # it becomes part of a path
                raise ValueError(f"{image['file_name']!r} is not a plain file name")
        ids = {image["id"] for image in images}
        annotations = [a for a in captions["annotations"] if a["image_id"] in ids]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DownloadError(f"{path} is not from COCO ({error!r}): delete it, run again") from error
    return {**captions, "images": images, "annotations": annotations}


def _absent(captions, folder):
    """The images that are not in `folder`. Files there are complete: they are renamed last."""
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return [image for image in captions["images"] if image["file_name"] not in present]


def _fetch_images(captions, folder, captions_file, base_url, options):
    """Fetch single images, eight at a time, then write `captions` to `captions_file`."""
    absent = _absent(captions, folder)
    urls = {folder / image["file_name"]: str(image.get("coco_url")) for image in absent}
    if base_url != BASE_URL:
        urls = {path: re.sub(r"^https?://[^/]*", base_url, url) for path, url in urls.items()}
    fetch_image = partial(fetch, **{"max_bytes": 2**25, "quiet": True, **options})
    with ThreadPoolExecutor(max_workers=8) as pool:  # after an error or Ctrl-C, starts no more
        list(tqdm(pool.map(fetch_image, urls.values(), urls), folder.name, len(urls), disable=None))
    try:
        write_text(captions_file, json.dumps(captions))
    except OSError as error:  # its message is a complete sentence
        raise DownloadError(error) from error


class _Retry(Exception):
    """A temporary failure: the attempt should be repeated."""


def fetch(url, path, tries=5, timeout=30, backoff=1.0, max_bytes=2**35, quiet=None):
    """Download `url` to `path`, which appears only when complete; returns `path`.

    Until then, the data is in `path.part`. A later attempt, in this call or another, requests only
    the rest, provided that the server's ETag or date (stored in `path.part.tag`) is unchanged.
    """
    path, part, tag_file = Path(path), Path(f"{path}.part"), Path(f"{path}.part.tag")
    if path.exists():
        return path
    for attempt in range(tries):
        time.sleep(backoff * (2**attempt - 1))
        try:
            with _disk_errors(path):
                _stream(url, part, tag_file, timeout, max_bytes, quiet)
                os.replace(part, path)
                tag_file.unlink()
            return path
        except _Retry as error:
            reason = error
    problem = f"{url} could not be downloaded in {tries} attempts ({reason})"
    raise DownloadError(f"{problem}: check the network and run again, {part} will be resumed")


def _stream(url, part, tag_file, timeout, max_bytes, quiet):
    """One attempt: append to `part` what is missing, or start it again."""
    tag = tag_file.read_text(encoding="latin-1") if tag_file.exists() else ""
    offset = part.stat().st_size if tag and part.exists() else 0
    wanted = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    with _open(url, part, wanted, timeout) as response:
        length, kind = response.length or 0, response.headers.get_content_type()
        if response.status != 206:  # no support for ranges, or the file has changed
            offset = 0
        size = offset + length
        if not length or size > max_bytes or kind == "text/html":
            problem = f"{url} has {size:,} bytes of {kind} for {part.stem}, limit {max_bytes:,}"
            raise DownloadError(f"{problem}: check the address, or sign in to the network first")
        etag = response.headers.get("ETag", "")  # a weak one, W/"...", does not identify bytes
        new_tag = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        span = response.headers["Content-Range"]
        if response.status == 206 and (tag, span) != (new_tag, f"bytes {offset}-{size - 1}/{size}"):
            part.unlink(missing_ok=True)
            raise _Retry("the server sent another range, or one of another version")
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(None, part.stem, size, initial=offset, unit="B", unit_scale=True, disable=quiet)
        with bar, open(part, "ab" if offset else "wb") as file:
            # After open(), so that the tag never describes bytes of an earlier version.
            tag_file.write_text(new_tag, encoding="latin-1")
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size != size:
        raise _Retry(f"received {part.stat().st_size:,} of {size:,} bytes")


def _open(url, part, headers, timeout):
    """Open `url`. Raises _Retry for temporary failures, DownloadError for permanent ones."""
    if not re.match(r"https?://", url):
        raise DownloadError(f"{url!r} for {part.stem} is refused: only http and https are allowed")
    opener = urllib.request.build_opener()
    opener.handle_open.pop("ftp", None)  # urllib follows redirects to ftp
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # `part` is longer than the file
            part.unlink(missing_ok=True)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Retry(error) from error
        problem = f"{url} for {part.stem} failed with {error.code} {error.reason}"
        raise DownloadError(f"{problem}: check the year and the base url") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Retry(error) from error


def _read(response):
    try:
        return response.read(2**16)  # small, because a timeout discards an incomplete chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(error) from error


@contextmanager
def _disk_errors(path):
    try:
        yield
    except OSError as error:
        problem = f"disk error with {path} ({error.strerror or error}), downloaded data is kept"
        raise DownloadError(f"{problem}: free disk space and run the same command again") from error


def unzip(path, folder, max_bytes=2**36, max_ratio=30, max_members=300_000):
    """Extract the zip at `path` to `folder`, then delete it.

    Members are extracted to a hidden folder and renamed into place after all of them have passed
    their CRC: files in `folder` are complete at any time. Other files there are kept.
    """
    path, folder = Path(path), Path(folder)
    scratch = folder / f".{path.name}.unzipping"  # on the same disk as its destination
    try:
        with _disk_errors(path), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            limit = min(max_bytes, max_ratio * path.stat().st_size)
            if size > limit or not 0 < len(members) <= max_members:
                raise ValueError(f"{len(members):,} members, {size:,} bytes exceed the limits")
            for member in members:
                safe = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){0,8}/?", member.filename)
                if not safe or stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
                    raise ValueError(f"member {member.filename!r} is a link, encrypted or misnamed")
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
            for member in tqdm(members, path.name, disable=None):
                archive.extract(member, scratch)
            _move(scratch, folder)
        path.unlink()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise DownloadError(f"{path} is not a valid zip ({error}): delete it, run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(source, target):
    """Rename `source` to `target`, merging folders."""
    if source.is_dir() and target.is_dir():
        for child in list(source.iterdir()):
            _move(child, target / child.name)
    else:
        os.replace(source, target)


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
