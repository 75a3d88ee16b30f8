"""The entries of ``data.augment.transforms``: named transforms with their parameters.

An entry is a name (``- photometric``) or a name with parameters (``- photometric: {p: 0.5, hue: 0.1}``). Errors name
its place in the list.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer
from pydantic_core import PydanticCustomError

from detr_ray.config.fields import Count, NonEmpty, NonNegative, Number, Positive, Section, Share, Violation

Shares = tuple[Share, Share]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Level = Annotated[int, Field(strict=True, ge=0, le=255)]
Quality = Annotated[int, Field(strict=True, ge=1, le=100)]


class TransformSection(Section):
    """One transform; its parameters stand under its name."""

    name: ClassVar[str]
    decides_size: ClassVar[bool] = False
    """Whether images have their final training size after it."""
    enlarges: ClassVar[bool] = False
    """Whether it may make sides longer, or change the shape other than by exchanging the sides."""

    @model_serializer(mode="wrap")
    def _under_its_name(self, handler: SerializerFunctionWrapHandler) -> Any:
        parameters = handler(self)
        return {self.name: parameters} if parameters else self.name

    def _ascending(self, *names: str) -> Iterator[Violation]:
        for name in names:
            low, high = getattr(self, name)
            if low > high:
                yield Violation((name,), "must be the smaller and the larger number")


class DetrTransform(TransformSection):
    """The original's: flip, then resize, or resize, crop and resize, as the other keys of `data.augment` say."""

    name = "detr"
    decides_size = True


class _ByChance(TransformSection):
    """A transform that is done to some of the samples."""

    p: Share = 0.5
    """Probability that it is done to a sample."""
    until_epoch: Count | None = None
    """Epoch, counted from 0, at which it is switched off: with `until_epoch: 60` it is used in the first 60 epochs.
    null: never."""


class PhotometricTransform(_ByChance):
    """Changes brightness, contrast, saturation, hue and the order of the channels, in this order."""

    name = "photometric"

    brightness: Share = 0.125
    """Factors are from 1 minus this to 1 plus this."""
    contrast: Share = 0.5
    """The same for the contrast."""
    saturation: Share = 0.5
    """The same for the saturation."""
    hue: Annotated[NonNegative, Field(le=0.5)] = 0.05
    """Hues are turned by up to this much of the colour wheel, either way."""
    channel_order: Share = 0.0
    """Probability that red, green and blue change places."""


class GrayscaleTransform(_ByChance):
    """Makes images grey."""

    name = "grayscale"

    p: Share = 0.1
    """Probability that it is done to a sample."""


class BlurTransform(_ByChance):
    """Blurs with a Gaussian."""

    name = "blur"

    p: Share = 0.1
    """Probability that it is done to a sample."""
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest standard deviation in pixels."""

    def rules(self) -> Iterator[Violation]:
        """The range must ascend."""
        yield from self._ascending("sigma")


class JpegTransform(_ByChance):
    """Adds JPEG compression artifacts."""

    name = "jpeg"

    p: Share = 0.1
    """Probability that it is done to a sample."""
    quality: tuple[Quality, Quality] = (30, 95)
    """Lowest and highest quality."""

    def rules(self) -> Iterator[Violation]:
        """The range must ascend."""
        yield from self._ascending("quality")


class HorizontalFlipTransform(_ByChance):
    """Mirrors left to right; `detr` does it by itself, with `data.augment.flip`."""

    name = "horizontal_flip"


class VerticalFlipTransform(_ByChance):
    """Mirrors top to bottom: for images without an up, such as those from above."""

    name = "vertical_flip"


class Rotate90Transform(_ByChance):
    """Turns by right angles: for images without an up."""

    name = "rotate90"

    turns: Annotated[tuple[Literal[1, 2, 3], ...], NonEmpty] = (1, 2, 3)
    """Numbers of quarter turns, counter-clockwise. One is drawn for every image."""


class ZoomOutTransform(_ByChance):
    """Puts an image at a random place on a larger one of a single colour, so that objects become smaller."""

    name = "zoom_out"
    enlarges = True

    scale: tuple[Annotated[Number, Field(ge=1, le=10)], Annotated[Number, Field(ge=1, le=10)]] = (1.0, 4.0)
    """Smallest and largest side of the larger image, in sides of the image."""
    fill_value: Level = 0
    """Value of red, green and blue around the image."""

    def rules(self) -> Iterator[Violation]:
        """The range must ascend."""
        yield from self._ascending("scale")


class IouCropTransform(_ByChance):
    """Cuts out a part around objects, so that objects become larger; objects whose centre is outside are removed."""

    name = "iou_crop"
    enlarges = True

    p: Share = 0.8
    """Probability that it is done to a sample."""
    scale: tuple[Fraction, Fraction] = (0.3, 1.0)
    """Smallest and largest side of the part, in sides of the image."""
    aspect: tuple[Positive, Positive] = (0.5, 2.0)
    """Smallest and largest width of the part, divided by its height."""
    min_iou: Annotated[tuple[Share, ...], NonEmpty] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """The part must have at least this IoU with an object; one of the values is drawn for every image. If no such place
    is found, the best one is taken."""

    def rules(self) -> Iterator[Violation]:
        """The ranges must ascend."""
        yield from self._ascending("scale", "aspect")


class ScaleJitterTransform(TransformSection):
    """Large-scale jitter: makes images larger or smaller, and cuts or fills them to a square of a fixed size."""

    name = "scale_jitter"
    decides_size = True
    enlarges = True

    size: Count = 640
    """Side of the square in pixels."""
    scale: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest size of the image. At 1, its long side is as long as the square's."""
    fill_value: Level = 0
    """Value of red, green and blue around the image."""

    def rules(self) -> Iterator[Violation]:
        """The range must ascend."""
        yield from self._ascending("scale")


class CutoutTransform(_ByChance):
    """Covers rectangles with a single colour."""

    name = "cutout"

    holes: tuple[Count, Count] = (1, 3)
    """Smallest and largest number of rectangles, up to 20."""
    size: tuple[Fraction, Fraction] = (0.05, 0.25)
    """Smallest and largest side of a rectangle, in sides of the image."""
    fill_value: Level = 114
    """Value of red, green and blue in the rectangles."""
    min_visible: Share = 0.2
    """Objects are removed if less than this share of their box is left."""

    def rules(self) -> Iterator[Violation]:
        """The ranges must ascend."""
        yield from self._ascending("holes", "size")
        if self.holes[1] > 20:
            yield Violation(("holes",), "must be at most 20 rectangles")


class MosaicTransform(_ByChance):
    """Puts parts of four images into one of the first one's size, so that objects become smaller."""

    name = "mosaic"

    centre: Shares = (0.3, 0.7)
    """Smallest and largest place of the point where the four meet, in sides of the image."""
    zoom: tuple[Annotated[Number, Field(ge=1)], Annotated[Number, Field(ge=1)]] = (1.0, 1.5)
    """Smallest and largest zoom into each image. At 1, as much of it is taken as its quarter has room for."""
    min_visible: Share = 0.2
    """Objects are removed if less than this share of their box is in the part."""

    def rules(self) -> Iterator[Violation]:
        """The ranges must ascend."""
        yield from self._ascending("centre", "zoom")


class MixupTransform(_ByChance):
    """Blends another image into an image; the objects of both are learnt."""

    name = "mixup"

    p: Share = 0.2
    """Probability that it is done to a sample."""
    weight: Shares = (0.45, 0.55)
    """Smallest and largest weight of the image; the other one has the rest."""

    def rules(self) -> Iterator[Violation]:
        """The range must ascend."""
        yield from self._ascending("weight")


class CopyPasteTransform(_ByChance):
    """Pastes the boxes of some objects of another image at random places."""

    name = "copy_paste"

    p: Share = 0.3
    """Probability that it is done to a sample."""
    max_objects: Annotated[Count, Field(le=100)] = 3
    """Largest number of objects that are pasted; from 1 to this number are drawn."""
    min_visible: Share = 0.7
    """Share of each box that must stay visible. An object is not pasted if no such place is found for it."""


TRANSFORMS: tuple[type[TransformSection], ...] = (
    DetrTransform,
    PhotometricTransform,
    GrayscaleTransform,
    BlurTransform,
    JpegTransform,
    HorizontalFlipTransform,
    VerticalFlipTransform,
    Rotate90Transform,
    ZoomOutTransform,
    IouCropTransform,
    ScaleJitterTransform,
    CutoutTransform,
    MosaicTransform,
    MixupTransform,
    CopyPasteTransform,
)
"""All possible entries of the list."""

_BY_NAME = {transform.name: transform for transform in TRANSFORMS}


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("transform", "{message}", {"message": message})


def _as_mapping(value: Any) -> Any:
    """An entry of the list as a name with parameters; refuses other values and unknown names."""
    if isinstance(value, TransformSection):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise _refusal("must be the name of a transform, or a name with parameters: {photometric: {p: 0.5}}")
    ((name, parameters),) = value.items()
    if name not in _BY_NAME:
        guess = difflib.get_close_matches(str(name), _BY_NAME, n=1)
        said = f"; did you mean '{guess[0]}'?" if guess else f": there are {', '.join(_BY_NAME)}"
        raise _refusal(f"there is no transform '{name}'{said}")
    if parameters is None:
        return {name: {}}
    if not isinstance(parameters, Mapping):
        raise _refusal(f"must hold parameters of {name}: {{{name}: {{key: value}}}}")
    for key in parameters:
        known = _BY_NAME[name].model_fields
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none: set the other keys of data.augment"
            raise _refusal(f"{name} has no parameter '{key}'; {has}")
    return {name: dict(parameters)}


def _name_of(value: Any) -> str | None:
    return value.name if isinstance(value, TransformSection) else next(iter(value), None)


def _parameters(value: Any) -> Any:
    """The parameters of the entry, for the section of its name."""
    return next(iter(value.values())) if isinstance(value, Mapping) else value


def _choose(transform: type[TransformSection]) -> Any:
    return Annotated[transform, BeforeValidator(_parameters), Tag(transform.name)]


if TYPE_CHECKING:
    TransformEntry = TransformSection
else:
    TransformEntry = Annotated[
        Union[tuple(_choose(transform) for transform in TRANSFORMS)],  # noqa: UP007 - it is made of a list
        Discriminator(_name_of),
        BeforeValidator(_as_mapping),
    ]


def refuse_order(transforms: tuple[TransformSection, ...]) -> str | None:
    """An error in the order of a list, in which one transform must set the final size; None if there is none."""
    deciding = [place for place, transform in enumerate(transforms) if transform.decides_size]
    names = " or ".join(transform.name for transform in TRANSFORMS if transform.decides_size)
    if len(deciding) != 1:
        return f"must have {names} once: it decides how large images become"
    late = [transform.name for transform in transforms[deciding[0] + 1 :] if transform.enlarges]
    if late:
        return f"must have {late[0]} before {transforms[deciding[0]].name}, which decides how large images become"
    return None
