"""Which files are media, by the end of their names."""

from pathlib import Path

SUFFIXES = {
    "video": ".mp4 .mkv .mov .avi .webm .m4v .mpg .mpeg .flv .wmv .ts".split(),
    "audio": ".wav .mp3 .ogg .flac .m4a .aac .opus .wma".split(),
    "image": ".png .jpg .jpeg .bmp .webp .tif .tiff".split(),
}


def media_kind(path: str | Path) -> str:
    """Return "video", "audio" or "image" for a file's name; "" for any other name."""
    suffix = Path(path).suffix.lower()
    for kind, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return kind
    return ""


def replace_folder(path: str | Path, old: str, new: str) -> Path:
    """Return a path in which the last folder of the name `old` has the name `new`.

    Raises ValueError without such a folder.
    """
    parts = list(Path(path).parts)
    last = len(parts) - 1 - parts[::-1].index(old)
    return Path(*parts[:last], new, *parts[last + 1 :])


def media_files(folder: Path) -> list[Path]:
    """Return the media files of a folder by name; hidden files and folders are left out."""
    found = [file for file in folder.iterdir() if media_kind(file) and file.is_file()]
    return sorted(file for file in found if not file.name.startswith("."))
