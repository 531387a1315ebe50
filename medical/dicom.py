"""DICOM files to frames (F, H, W, C), and what their headers say, without a word about the patient.

What leaves this file as text (messages, names, reprs) is numbers, words of closed lists and hashes. Text of the files
stays in them, that of the patient module above all: also what pydicom would quote in a warning or a log.
"""

import contextlib
import hashlib
import logging
import re
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adaptsuite.errors import DataError, UsageError

MODALITIES = (
    "CR CT DX ECG IO IVUS KO MG MR NM OCT OP OPT OT PR PT PX RF RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SM SR US XA XC"
).split()
MAY_SHOW_TEXT = ("US", "IVUS", "SC", "OT", "XC", "ES", "OP", "RF", "XA", "other")  # whose machines draw into pictures
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
MOST_SAMPLES = 1 << 27  # of one frame: a header of a few bytes can ask for gigabytes
MOST_FRAMES = 1 << 20
MOST_INFLATED = 1 << 30  # bytes of a deflated file
MOST_BYTES = 4 << 30  # of the frames that `read` holds at once
TEXT = ("PN", "LO", "SH", "ST", "LT", "UC", "UT", "DA", "DT")  # kinds of elements that may tell who somebody is
PICTURES = re.compile("Image Storage|Segmentation Storage|RT Dose Storage")  # classes of objects that hold pixels
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"  # Pillow decodes it with 8 bits only
PLUGINS = (  # syntaxes by the start of their numbers, and what would decode them
    ("1.2.840.10008.1.2.4.90", "pip install pylibjpeg pylibjpeg-openjpeg"),
    ("1.2.840.10008.1.2.4.91", "pip install pylibjpeg pylibjpeg-openjpeg"),
    ("1.2.840.10008.1.2.4.20", "pip install pylibjpeg pylibjpeg-openjpeg"),
    ("1.2.840.10008.1.2.4.10", "it is a video, convert it to frames first"),
    ("1.2.840.10008.1.2.4.", "pip install pylibjpeg pylibjpeg-libjpeg"),
    ("1.2.840.10008.1.2.5", "pip install pylibjpeg pylibjpeg-rle"),
    ("", "convert it first"),  # SMPTE and what is still to come
)


@dataclass(frozen=True)
class DicomFile:
    """What the header of one file says. Its repr holds no identifier."""

    name: str  # what messages and listings call it
    path: Path = field(repr=False)
    modality: str  # of MODALITIES, or "other"
    syntax: str  # the name of its transfer syntax
    frames: int  # 0: it holds no pixels (reports, structure sets, plans)
    rows: int
    columns: int
    channels: int  # after decoding: 1 grey, 3 colour
    bits: int  # stored, of a sample
    photometric: str  # of GREY or COLOUR, or "other"
    burned_in: bool | None  # whether text is drawn into the pixels; None: the file does not say
    localizer: bool  # a scout on which others were planned
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    region: tuple[int, int, int, int] | None  # top, bottom, left, right of the ultrasound picture within the frame
    shrunk: bool  # its ultrasound region is that of a larger frame, so it has neither region nor scale
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    uid: str = field(repr=False)
    sop_class: str = field(repr=False)
    frame_of_reference_uid: str = field(repr=False)

    @property
    def series(self) -> str:
        """A hash that tells series apart: UIDs themselves may hold dates and serial numbers."""
        return hashlib.sha256(f"{self.study_uid}/{self.series_uid}".encode()).hexdigest()[:12]

    @property
    def remarks(self) -> list[str]:
        """What makes it doubtful, to be said once."""
        said = []
        if self.frames and self.burned_in is None and self.modality in MAY_SHOW_TEXT:
            said.append("does not say whether text, such as the patient's name, is burned into its pixels")
        if self.shrunk:
            said.append("its ultrasound region exceeds the frame: it was made smaller, and is neither cut nor to scale")
        return said


class Unusable(Exception):
    """Why a file cannot be used, and needles of its text, so that it can be named without any of it."""

    def __init__(self, reason: str, needles: frozenset[str] = frozenset()):
        self.reason, self.needles = reason, needles


def inspect(path: str | Path, shown: str | None = None) -> DicomFile:
    """Reads the header of one file. Raises DataError that names the file and what is wrong with it.

    shown: what to call it, by default the path; parts that hold text of the file's own header are withheld (`named`).
    """
    path = Path(path)
    try:
        file, needles = facts(path)
    except Unusable as bad:
        raise DataError(f"{named(path, shown, bad.needles)}: {bad.reason}") from None
    return replace(file, name=named(path, shown, needles))


def read(file: DicomFile | str | Path, indices: Sequence[int] | None = None, **options: Any) -> np.ndarray:
    """(F, H, W, C): all frames of a file or those of `indices` at once; options and errors as `frames`."""
    file = file if isinstance(file, DicomFile) else inspect(file)
    count = file.frames if indices is None else len(indices)
    size = count * file.rows * file.columns * file.channels * (4 if options.get("units") == "physical" else 1)
    if size > MOST_BYTES:
        raise DataError(f"{file.name}: {count} frames fill {size:,} bytes at once; `frames` gives them one by one")
    return np.stack(list(frames(file, indices, **options)))


def frames(
    file: DicomFile | str | Path,
    indices: Sequence[int] | None = None,
    *,
    units: Literal["display", "physical"] = "display",
    window: tuple[float, float] | None = None,
    region: bool = False,
    allow_burned_in: bool = False,
) -> Iterator[np.ndarray]:
    """The frames of a file one at a time, (H, W, C): C = 1 for grey, 3 (RGB) for colour and palettes.

    display: uint8 as a viewer shows it: rescaled, windowed, MONOCHROME1 inverted. window: (centre, width) in physical
    units, HU for CT; without it the file's own, and where it has none the range of its values over all frames.
    physical: float32, rescaled only: HU for CT, Gy for a dose, as stored where the file gives no scale, and colour.
    region: only the ultrasound picture, without the banner around it, where the file tells it (`DicomFile.region`).
    Raises DataError for a file that is damaged, that no installed plugin decodes, or that says that text is burned into
    its pixels, unless that is allowed.
    """
    file = file if isinstance(file, DicomFile) else inspect(file)
    _check_request(file, indices, units, window, allow_burned_in)
    with _reading(file):
        header, start = _load(file.path)
        _check_decoder(header)
        _check_codestreams(file, header, start)
        unknown = units == "display" and window is None and _has_no_scale(file, header)
    window = _range(file, header) if unknown else window
    top, bottom, left, right = file.region if region and file.region else (0, file.rows, 0, file.columns)
    for i, raw in _decoded(file, header, range(file.frames) if indices is None else indices):
        with _reading(file):
            frame = _finished(file, header, i, raw[top:bottom, left:right], units, window)
        if not np.isfinite(frame).all():
            raise DataError(f"{file.name}: frame {i} holds NaN or infinite values")
        yield np.ascontiguousarray(frame)


# ---- headers


def facts(path: Path) -> tuple[DicomFile, frozenset[str]]:
    """What the header says, the name left open, and the needles of its text. Raises Unusable."""
    _check_start(path)
    needles: frozenset[str] = frozenset()
    with quiet():
        try:
            header, start = _load(path)
            needles = frozenset(_needles(header))
            file = _described(path, header)
            if file.frames:
                _check_size(file, header, path.stat().st_size - start)
            elif PICTURES.search(header.file_meta.MediaStorageSOPClassUID.name):
                raise Unusable("cut short: an image without rows and columns")
            return file, needles
        except Unusable as bad:
            raise Unusable(bad.reason, needles) from None
        except Exception as error:  # pydicom raises any, with the file's text in their messages
            needles = needles or _needles_of_wreck(path)
            raise Unusable(f"damaged or cut short ({type(error).__name__})", needles) from None


def _check_start(path: Path) -> None:
    if not path.is_file():
        raise Unusable("no such file")
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError as error:
        raise Unusable(f"cannot be opened ({error.strerror})") from None
    if not start:
        raise Unusable("the file is empty (0 bytes)")
    if start[128:] != b"DICM":
        raise Unusable("not a DICOM file ('DICM' is not at byte 128)")


def load(path: Path) -> Any:
    """The pydicom Dataset of a file without its pixels; to be called, and looked at, within `quiet`."""
    return _load(path)[0]


def _load(path: Path) -> tuple[Any, int]:
    """That, and the byte at which the element of the pixels starts."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if not syntax:
        raise Unusable("its transfer syntax is missing")
    if syntax.is_private:
        raise Unusable("its transfer syntax is private, no decoder of pydicom knows it: convert it first")
    if syntax.is_deflated:
        _check_inflated(path)
    with path.open("rb") as file:
        return pydicom.dcmread(file, stop_before_pixels=True), file.tell()


def _check_inflated(path: Path) -> None:
    """A deflated file is unpacked as a whole before anything of it can be looked at."""
    from pydicom.filereader import read_file_meta_info

    raw = path.read_bytes()
    stream, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = raw[144 + read_file_meta_info(path).FileMetaInformationGroupLength :]  # 144: up to the end of that length
    while rest and total <= MOST_INFLATED:
        total += len(stream.decompress(rest, 1 << 20))
        rest = stream.unconsumed_tail
    if total > MOST_INFLATED:
        raise Unusable(f"unpacks to more than {MOST_INFLATED:,} bytes")


def _described(path: Path, header: Any) -> DicomFile:
    has_pixels = "Rows" in header and "Columns" in header
    photometric = _one_of(GREY + COLOUR, header.get("PhotometricInterpretation"))
    return DicomFile(
        name="",
        path=path,
        modality=_one_of(MODALITIES, header.get("Modality")),
        syntax=_syntax_name(header),
        frames=_number(header, "NumberOfFrames", 1) if has_pixels else 0,
        rows=_number(header, "Rows", 0),
        columns=_number(header, "Columns", 0),
        channels=3 if photometric in COLOUR else 1,
        bits=_number(header, "BitsStored", 0),
        photometric=photometric,
        burned_in={"YES": True, "NO": False}.get(str(header.get("BurnedInAnnotation", "")).strip().upper()),
        localizer="LOCALIZER" in map(str, values(header, "ImageType")),
        spacing_mm=_spacing(header),
        region=_region(header) if has_pixels else None,
        shrunk=_shrunk(header),
        study_uid=str(header.get("StudyInstanceUID", "")),
        series_uid=str(header.get("SeriesInstanceUID", "")),
        uid=str(header.get("SOPInstanceUID", "")),
        sop_class=str(header.get("SOPClassUID", "")),
        frame_of_reference_uid=str(header.get("FrameOfReferenceUID", "")),
    )


def _check_size(file: DicomFile, header: Any, size: int) -> None:
    """Raises Unusable for pixels that would not fit into memory, or into the bytes that are left for them."""
    from pydicom.pixels.utils import get_expected_length

    samples = file.rows * file.columns * _number(header, "SamplesPerPixel", 1)
    if not 0 < samples <= MOST_SAMPLES:
        raise Unusable(f"{file.rows} x {file.columns} pixels are not between 1 and {MOST_SAMPLES:,} samples")
    if not 1 <= file.frames <= MOST_FRAMES:
        raise Unusable(f"{file.frames:,} frames are not between 1 and {MOST_FRAMES:,}")
    syntax = header.file_meta.TransferSyntaxUID
    if not (syntax.is_encapsulated or syntax.is_deflated) and (expected := get_expected_length(header)) > size:
        raise Unusable(f"truncated: its pixels need {expected:,} bytes, {max(0, size):,} are there")


def _number(header: Any, keyword: str, default: int) -> int:
    try:
        return default if header.get(keyword) is None else int(header.get(keyword))
    except (TypeError, ValueError):
        raise Unusable(f"its {keyword} is not a number") from None


def values(header: Any, keyword: str) -> list[Any]:
    """The values of an element: pydicom gives one bare, several as a sequence."""
    return _listed(header.get(keyword))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) or not isinstance(value, Sequence) else [*value]


def _one_of(words: Iterable[str], value: Any) -> str:
    return str(value) if str(value) in words else "other"


def _syntax_name(header: Any) -> str:
    uid = header.file_meta.TransferSyntaxUID
    return uid.name if uid.name != uid else "other"  # a number without a name is not one of the standard's


def _spacing(header: Any) -> tuple[float, float] | None:
    """PixelSpacing, or the scale of the ultrasound region."""
    found = [float(v) for v in values(header, "PixelSpacing")]
    item = _picture(header)
    if (
        not found and item is not None and item.get("PhysicalUnitsXDirection") == 3 and not _shrunk(header)
    ):  # centimetres
        found = [10 * abs(float(item.PhysicalDeltaY)), 10 * abs(float(item.PhysicalDeltaX))]
    return (found[0], found[1]) if len(found) == 2 and all(0 < v < float("inf") for v in found) else None


def _picture(header: Any) -> Any:
    """The largest 2-D region of an ultrasound frame."""

    def area(item: Any) -> int:
        width = item.RegionLocationMaxX1 - item.RegionLocationMinX0
        return width * (item.RegionLocationMaxY1 - item.RegionLocationMinY0)

    items = [item for item in header.get("SequenceOfUltrasoundRegions") or () if item.get("RegionSpatialFormat") == 1]
    return max(items, key=area, default=None)


def _shrunk(header: Any) -> bool:
    """Whether the region exceeds the frame both to the right and below: the frame was made smaller and its box was not,
    so that neither box nor scale fit. (One side alone: a part was cut off, what is left is where it was.)"""
    item = _picture(header)
    if item is None or "Rows" not in header:
        return False
    return item.RegionLocationMaxX1 > header.Columns and item.RegionLocationMaxY1 > header.Rows


def _region(header: Any) -> tuple[int, int, int, int] | None:
    if (item := _picture(header)) is None or _shrunk(header):
        return None
    top, left = max(0, int(item.RegionLocationMinY0)), max(0, int(item.RegionLocationMinX0))
    bottom = min(int(header.Rows), int(item.RegionLocationMaxY1) + 1)  # its corners belong to the box
    right = min(int(header.Columns), int(item.RegionLocationMaxX1) + 1)
    return (top, bottom, left, right) if top < bottom and left < right else None


# ---- names and silence


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pydicom, highdicom and nibabel quote values of the file in warnings and logs: in here none of them gets out."""
    from pydicom import config

    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom", "nibabel")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts(header: Any) -> set[str]:
    """Every text value of a pydicom Dataset, sequences and private elements included: what no output may hold."""
    return {text for _, text in _texts(header)}


def _texts(header: Any) -> Iterator[tuple[bool, str]]:
    """("name", text) of names, ("patient", text) of the rest of the patient module, ("", text) of others."""
    for tag in header.keys():
        kind = header.get_item(tag).VR
        if tag.group == 0x5200 or kind not in (
            *TEXT,
            "SQ",
            None,
        ):  # None: implicit, known when the element is looked at
            continue  # 5200: one item a frame, of numbers
        element = header[tag]
        if element.VR == "SQ":
            for item in element.value or ():
                yield from _texts(item)
        elif element.VR in TEXT:
            kind = "name" if element.VR == "PN" else "patient" if tag.group == 0x0010 else ""
            yield from ((kind, text) for value in _listed(element.value) if (text := str(value).strip()))


def _needles(header: Any) -> set[str]:
    """What a path is searched for: texts, words of names, and of the patient also what is short (` li `, ` 77 `)."""
    found = list(_texts(header))
    names = {word for kind, text in found if kind == "name" for word in _words(text)}
    own = names | {"".join(_words(text)) for kind, text in found if kind == "patient"}
    short = {f" {word} " for word in own if 2 <= len(word) < 4 and word.upper() not in MODALITIES}
    return needles(text for _, text in found) | needles(names) | short


def needles(found: Iterable[str]) -> set[str]:
    """Texts in small letters without spaces and signs; of four and more, and no longer than a path."""
    return {word for text in found if 4 <= len(word := "".join(_words(text))) <= 255}


def _needles_of_wreck(path: Path) -> frozenset[str]:
    """Those of what can be read in front of the place where a file is damaged."""
    import pydicom

    try:
        return frozenset(_needles(pydicom.dcmread(path, stop_before_pixels=True, force=True)))
    except Exception:  # nothing can be known of it
        return frozenset()


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c)).split()


def named(path: Path, shown: str | None, needles: Iterable[str], number: int = 0) -> str:
    """The name as given; parts of it that hold one of the needles are withheld, and a hash of the file's bytes added.

    (A hash of the path would tell whoever guesses the patient's name that the guess is right.)
    """

    shown = str(path) if shown is None else shown
    if not tells(shown, needles):
        return shown
    kept = "/".join("***" if tells(part, needles) else part.strip("/") for part in Path(shown).parts)
    kept = "***" if tells(kept, needles) else kept
    which = f"file {number}, " if number else ""
    return f"{kept} ({which}sha256 {content_hash(path)[:12]}; what is *** is also text of its header)"


def tells(shown: str, needles: Iterable[str]) -> bool:
    """Whether a text holds one of the needles, however it is spelled and parted."""
    words = _words(shown)
    spaced, joined = f" {' '.join(words)} ", "".join(words)
    return any(needle in (spaced if needle.startswith(" ") else joined) for needle in needles)


# ---- pixels


@contextlib.contextmanager
def _reading(file: DicomFile) -> Iterator[None]:
    """Whatever pydicom raises becomes one line; its own words may quote the file, so they are not passed on."""
    try:
        with quiet():
            yield
    except Unusable as bad:
        raise DataError(f"{file.name}: {bad.reason}") from None
    except Exception as error:
        raise DataError(f"{file.name}: damaged or cut short ({type(error).__name__})") from None


def _check_request(file: DicomFile, indices: Any, units: str, window: Any, allow_burned_in: bool) -> None:
    if units not in ("display", "physical"):
        raise UsageError(f"units {units!r} are neither display nor physical")
    if window is not None and (len(window) != 2 or not window[1] > 0):
        raise UsageError(f"window {window!r} is not a centre and a width above 0")
    if not file.frames:
        raise DataError(f"{file.name}: holds no pixels (modality {file.modality})")
    if file.photometric == "other":
        raise DataError(f"{file.name}: its colours are of a kind that is not read; {', '.join(GREY + COLOUR)} are")
    if file.burned_in and not allow_burned_in:
        raise DataError(f"{file.name}: says that text is burned into its pixels: remove it first, or allow it")
    if wrong := [i for i in indices or () if not 0 <= i < file.frames]:
        raise UsageError(f"{file.name}: frame {wrong[0]} is not one of its {file.frames}")


def _check_decoder(header: Any) -> None:
    """Raises Unusable that names the plugin which would decode it."""
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    with contextlib.suppress(NotImplementedError):
        if get_decoder(syntax).is_available and not (syntax == JPEG_EXTENDED and header.BitsStored > 8):
            return
    raise Unusable(f"{_syntax_name(header)} cannot be decoded here: {_remedy(syntax)}")


def _remedy(syntax: str) -> str:
    return next(remedy for start, remedy in PLUGINS if syntax.startswith(start))


def _check_codestreams(file: DicomFile, header: Any, start: int) -> None:
    """Raises Unusable where a compressed frame is larger than the header says, whose size was found to be bearable."""
    from pydicom.encaps import generate_frames

    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or "RLE" in syntax.name:  # which pydicom unpacks into the header's size
        return
    with file.path.open("rb") as stream:
        stream.seek(start)
        stream.seek(start + (12 if stream.read(6)[4:] in (b"OB", b"OW") else 8))  # tag, kind and length of the pixels
        for i, data in zip(range(file.frames), generate_frames(stream, number_of_frames=file.frames), strict=False):
            if (size := _coded_size(data)) not in (None, (file.rows, file.columns)):
                raise Unusable(f"frame {i} is coded with {size[0]} x {size[1]} pixels, its header says otherwise")


def _coded_size(data: bytes) -> tuple[int, int] | None:
    """(rows, columns) in a JPEG, JPEG-LS or JPEG 2000 stream; None where none of them is recognized."""
    if data[:4] == b"\xff\x4f\xff\x51":  # its first segment is the size: Xsiz, Ysiz, XOsiz, YOsiz
        x, y, x0, y0 = struct.unpack(">4I", data[8:24])
        return y - y0, x - x0
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])[0]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return struct.unpack(">2H", data[at + 5 : at + 9])
        at += 1 if marker == 0xFF else 2 + length
    return None


def _decoded(file: DicomFile, header: Any, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Frames as stored, colour in RGB, of which one is in memory at a time."""
    import pydicom
    from pydicom.pixels import iter_pixels

    with _reading(file):
        deflated = header.file_meta.TransferSyntaxUID.is_deflated  # cannot be read in pieces
        found = iter_pixels(pydicom.dcmread(file.path) if deflated else file.path, indices=indices)
    for i in indices:
        with _reading(file):
            try:
                raw = _next(found, file.path, i)
            except RuntimeError:  # of every plugin that is installed
                remedy = _remedy(header.file_meta.TransferSyntaxUID)
                raise Unusable(f"frame {i} cannot be decoded: damaged, or it takes another plugin: {remedy}") from None
            if raw.shape[:2] != (file.rows, file.columns):
                raise Unusable(f"cut short: frame {i} of {file.frames} is not whole")
        yield i, raw


def _next(found: Iterator[np.ndarray], path: Path, i: int) -> np.ndarray:
    """The next frame. Where pydicom's iterator fails (JPEG 2000 of another sign, kinds of elements that are missing) it
    is decoded from the whole file."""
    import pydicom

    with contextlib.suppress(ValueError, StopIteration):
        return next(found)
    return pydicom.pixels.pixel_array(pydicom.dcmread(path), index=i)


def _finished(file: DicomFile, header: Any, i: int, raw: np.ndarray, units: str, window: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) as stored -> (H, W, C) in the units asked for."""
    if file.photometric in COLOUR:
        raw = _through_palette(header, raw) if raw.ndim == 2 else raw
        bits = 8 * raw.itemsize if file.photometric == "PALETTE COLOR" else file.bits
        return raw.astype(np.float32) if units == "physical" else (raw >> max(0, bits - 8)).astype(np.uint8)
    physical = _rescaled(header, i, raw)
    if units == "physical":
        return physical[..., None].astype(np.float32)
    shown = _windowed(file, header, i, physical, window)
    shown = 1 - shown if file.photometric == "MONOCHROME1" else shown
    return (255 * shown[..., None] + 0.5).astype(np.uint8)


def _through_palette(header: Any, raw: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    entries, _, bits = header.RedPaletteColorLookupTableDescriptor
    if bits == 8 and not 1 <= entries <= 256:  # of which pydicom would lose the rest
        raise Unusable(f"its palette has {entries or 65536} colours, 256 can be told apart in 8 bits")
    return apply_color_lut(raw, header)[..., :3]


def functional_group(header: Any, i: int, name: str) -> Any:
    """What an enhanced object says of its frame i, or of all; of other objects None."""
    groups = [*(header.get("PerFrameFunctionalGroupsSequence") or ())[i : i + 1]]
    for group in (*groups, *(header.get("SharedFunctionalGroupsSequence") or ())):
        if group.get(name):
            return group[name].value[0]
    return None


def _rescaled(header: Any, i: int, raw: np.ndarray) -> np.ndarray:
    """float64 through the modality table, by slope and intercept, or by the scale of a dose."""
    source = functional_group(header, i, "PixelValueTransformationSequence") or header
    if source.get("ModalityLUTSequence"):
        return _looked_up(source.ModalityLUTSequence[0], header, raw)[0]
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    slope = header.get("DoseGridScaling", slope) if header.get("Modality") == "RTDOSE" else slope
    slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise Unusable(f"rescale slope {slope} and intercept {intercept} give its pixels no value")
    return raw.astype(np.float64) * slope + intercept


def _looked_up(item: Any, header: Any, found: np.ndarray) -> tuple[np.ndarray, int]:
    """Values through a modality or VOI table, and the bits of its entries."""
    entries, first, bits = item.LUTDescriptor
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if header.file_meta.TransferSyntaxUID.is_little_endian else ">u2")
    table = np.asarray(data, dtype=np.float64)[: entries or 1 << 16]
    return table[np.clip(np.rint(found) - first, 0, len(table) - 1).astype(np.int64)], int(bits)


def _own_window(header: Any, i: int) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window that the file gives for a frame."""
    source = functional_group(header, i, "FrameVOILUTSequence") or header
    centre, width = values(source, "WindowCenter"), values(source, "WindowWidth")
    if not centre or not width or not float(width[0]) > 0:
        return None
    return float(centre[0]), float(width[0]), str(source.get("VOILUTFunction") or "LINEAR").upper()


def _windowed(file: DicomFile, header: Any, i: int, physical: np.ndarray, window: Any) -> np.ndarray:
    """Values -> [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if window is None and (tables := header.get("VOILUTSequence")):
        found, bits = _looked_up(tables[0], header, physical)
        return np.clip(found / (2**bits - 1), 0, 1)
    full = 2**file.bits - 1
    own = _own_window(header, i) if window is None else (*window, "LINEAR_EXACT")
    centre, width, kind = own or (full / 2, full, "LINEAR_EXACT")
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (physical - centre) / width))
    if kind == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-9)  # a width of 1 is a threshold
    return np.clip((physical - centre) / width + 0.5, 0, 1)


def _has_no_scale(file: DicomFile, header: Any) -> bool:
    """Whether nothing says what is black and what is white: no window, and other than the plain 8 bits of a picture."""
    if file.photometric in COLOUR or header.get("VOILUTSequence") or _own_window(header, 0):
        return False
    return file.bits > 8 or bool(header.get("PixelRepresentation")) or "RescaleSlope" in header


def _range(file: DicomFile, header: Any) -> tuple[float, float]:
    """(centre, width) of the values of all frames without the padding, in a pass of its own."""
    padding, low, high = header.get("PixelPaddingValue"), np.inf, -np.inf
    for i, raw in _decoded(file, header, range(file.frames)):
        with _reading(file):
            found = _rescaled(header, i, raw if padding is None else raw[raw != padding])
        if found.size:
            low, high = min(low, found.min()), max(high, found.max())
    low, high = (low, high) if np.isfinite([low, high]).all() else (0.0, 0.0)
    return (low + high) / 2, max(high - low, 1e-9)
