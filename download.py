"""Download COCO images and captions, whole (2017: 19 GB of zips, twice that while unzipping):
$ python download.py --year 2017 --root data/coco
or, as a small start, the annotations and only the first 2000 images of each split:
$ python download.py --year 2017 --root data/coco --first 2000
Stop it whenever you like: the same command resumes, and fetches nothing that is complete.

`root` then holds train2017/*.jpg, val2017/*.jpg and annotations/captions_train2017.json etc., and
with `--first N` captions_train2017.firstN.json: the N images of lowest id only, written at the end.
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

BASE_URL = "http://images.cocodataset.org"
YEARS, SPLITS = (2014, 2017), ("train", "val")


class DownloadError(RuntimeError):
    """What went wrong and what to do about it, in one sentence."""


def download_coco(root, year=2017, splits=SPLITS, first=None, base_url=BASE_URL, **options):
    """Bring COCO `year` under `root`; return {split: (image folder, captions file)}.
    `first=N` fetches N single images per split, not its zip, each from its `coco_url`, and returns
    the captions file cut down to them. A `base_url` other than the default is a mirror: it replaces
    scheme and host of every `coco_url` too. `options` go to `fetch`: tries, timeout, backoff.
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
    """Load a captions file, cut down to the `first` images in the order of their ids."""
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
        images = sorted(captions["images"], key=lambda image: image["id"])[:first]
        for image in images:
            if not re.fullmatch(r"[\w-]+\.jpg", image["file_name"]):  # it becomes a path here
                raise ValueError(f"{image['file_name']!r} is no plain file name")
        ids = {image["id"] for image in images}
        annotations = [a for a in captions["annotations"] if a["image_id"] in ids]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DownloadError(f"{path} is not of COCO ({error!r}): delete it, run again") from error
    return {**captions, "images": images, "annotations": annotations}


def _absent(captions, folder):
    """The images that `folder` lacks. A file that is there is complete: it got its name last."""
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return [image for image in captions["images"] if image["file_name"] not in present]


def _fetch_images(captions, folder, captions_file, base_url, options):
    """Fetch single images, a few at a time, and write `captions` once all of them are there."""
    absent = _absent(captions, folder)
    urls = {folder / image["file_name"]: str(image.get("coco_url")) for image in absent}
    if base_url != BASE_URL:
        urls = {path: re.sub(r"^https?://[^/]*", base_url, url) for path, url in urls.items()}
    fetch_image = partial(fetch, **{"max_bytes": 2**25, "quiet": True, **options})
    with ThreadPoolExecutor(max_workers=8) as pool:  # an error or Ctrl-C cancels those not begun
        list(tqdm(pool.map(fetch_image, urls.values(), urls), folder.name, len(urls), disable=None))
    part = Path(f"{captions_file}.part")
    with _disk_errors(captions_file):
        part.write_text(json.dumps(captions), encoding="utf-8")
        os.replace(part, captions_file)


class _Retry(Exception):
    """A try that failed in a way that another one may cure."""


def fetch(url, path, tries=5, timeout=30, backoff=1.0, max_bytes=2**35, quiet=None):
    """Download `url` to `path`, which appears only when complete; return `path`.
    Bytes arrive in `path.part`. A later try, in this call or another, asks only for the rest,
    provided that the server's ETag or date (kept in `path.part.tag`) shows the file unchanged.
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
    problem = f"{url} did not arrive in {tries} tries ({reason})"
    raise DownloadError(f"{problem}: check the network and run again, {part} is kept and resumed")


def _stream(url, part, tag_file, timeout, max_bytes, quiet):
    """One try: append to `part` what it still lacks, or write it afresh."""
    tag = tag_file.read_text(encoding="latin-1") if tag_file.exists() else ""
    offset = part.stat().st_size if tag and part.exists() else 0
    wanted = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    with _open(url, part, wanted, timeout) as response:
        length, kind = response.length or 0, response.headers.get_content_type()
        if response.status != 206:  # no ranges here, or If-Range found that the file changed
            offset = 0
        size = offset + length
        if not length or size > max_bytes or kind == "text/html":
            problem = f"{url} offers {size:,} bytes of {kind} for {part.stem}, limit {max_bytes:,}"
            raise DownloadError(f"{problem}: check the address, or sign in to your network first")
        etag = response.headers.get("ETag", "")  # a weak one, W/"...", vouches for too little
        new_tag = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        span = response.headers["Content-Range"]
        if response.status == 206 and (tag, span) != (new_tag, f"bytes {offset}-{size - 1}/{size}"):
            part.unlink(missing_ok=True)
            raise _Retry("the server answered with a piece of another file")
        part.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(None, part.stem, size, initial=offset, unit="B", unit_scale=True, disable=quiet)
        with bar, open(part, "ab" if offset else "wb") as file:
            tag_file.write_text(new_tag, encoding="latin-1")  # after the old bytes are gone
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size != size:
        raise _Retry(f"{part.stat().st_size:,} of {size:,} bytes arrived")


def _open(url, part, headers, timeout):
    """Open `url` for reading; `_Retry` for what may pass, `DownloadError` for what will not."""
    if not re.match(r"https?://", url):
        raise DownloadError(f"{url!r} is refused for {part.stem}: give an http or https address")
    opener = urllib.request.build_opener()
    opener.handle_open.pop("ftp", None)  # urllib would follow a redirect there
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # `part` is not the beginning of what the server has now
            part.unlink(missing_ok=True)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Retry(error) from error
        problem = f"{url} for {part.stem} was answered {error.code} {error.reason}"
        raise DownloadError(f"{problem}: check the year and the base url") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Retry(error) from error


def _read(response):
    try:
        return response.read(2**16)  # small, so that a stall loses little
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(error) from error


@contextmanager
def _disk_errors(path):
    try:
        yield
    except OSError as error:
        problem = f"The disk refused {path} ({error.strerror or error}), what arrived is kept"
        raise DownloadError(f"{problem}: free space there and run the same again") from error


def unzip(path, folder, max_bytes=2**36, max_ratio=30, max_members=300_000):
    """Unpack the zip at `path` into `folder`, then delete it.
    Members unfold in a hidden folder and move into place only after all of them passed their CRC,
    each by a rename: what stands in `folder` is whole at any time, and what else is there stays.
    """
    path, folder = Path(path), Path(folder)
    scratch = folder / f".{path.name}.unzipping"  # on the same disk as its destination
    try:
        with _disk_errors(path), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            limit = min(max_bytes, max_ratio * path.stat().st_size)
            if size > limit or not 0 < len(members) <= max_members:
                raise ValueError(f"{len(members):,} members, {size:,} bytes are out of its limits")
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
        raise DownloadError(f"{path} is no usable zip ({error}): delete it, run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(source, target):
    """Rename `source` to `target`; a folder that is there already receives its content."""
    if source.is_dir() and target.is_dir():
        for child in list(source.iterdir()):
            _move(child, target / child.name)
    else:
        os.replace(source, target)


def main():
    parser = argparse.ArgumentParser(description="Download COCO images and captions.")
    parser.add_argument("--year", type=int, default=2017, choices=YEARS)
    parser.add_argument("--root", default="data/coco", help="folder that will hold the dataset")
    parser.add_argument("--first", type=int, metavar="N", help="only N images of each split")
    parser.add_argument("--base-url", default=BASE_URL, help="a mirror of COCO's server")
    try:
        for split, paths in download_coco(**vars(parser.parse_args())).items():
            print(f"{split}:", *paths)
    except (DownloadError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: the .part files stay, the same command resumes") from None


if __name__ == "__main__":
    main()
