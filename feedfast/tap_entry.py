"""An entry of a recipe's ``teachers.N.taps``: a place in a network, and how its map is stored; as text or as a table.

The text is ``place[+margin][@share][:codec]``. A place is a group ("ofd", "final") or "name=module.path", which may
end with :pre, :map and the like. No codec is called like one of these, and only the last word can be a codec: what
belongs to the place is told without a network. Shares are written as Python writes the number, so that one entry has
one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

__all__ = ["CodecName", "TapEntry"]

CodecName = Literal["f32", "f16", "u8", "u6", "u5", "u4"]
_CODECS: Final = get_args(CodecName)
_MARGIN: Final = "+margin"
_SHARE: Final = "@"


class TapEntry(BaseModel):
    """One entry of `taps` as a table; as text `place[+margin][@share][:codec]`: `"ofd+margin@0.25"`, `"ofd2:u4"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tap: str = Field(
        min_length=1,
        description="a group (final, ofd, stage), one tap of a group (ofd2), logits of pixels, or "
        '"name=module.path", with :pre, :post or :end and, of tokens, :map or :tokens after it '
        "(`feedfast taps MODEL` lists them)",
    )
    margin: bool = Field(False, description="store the map after OFD's margin ReLU, as `+margin` does")
    sample: float | None = Field(
        None,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="store this share of a map's positions, drawn anew for every sample and view, as `@0.25` does; the "
        "student's map is compared there. For methods that sum over positions: `ofd`, `ab`, `at`, "
        "`fitnet`, `vid`, `cwd`, `camkd`",
    )
    codec: CodecName | None = Field(
        None,
        description="the stored form of its values; none = `cache.codec`. Logits have none of their own: they are f32 "
        "where all of the teacher's other taps are, else f16",
    )

    @property
    def name(self) -> str:
        """The group's name, or that of the tap written by hand."""
        return self.tap.partition("=")[0]

    @property
    def by_hand(self) -> bool:
        """Whether it is a place of its own and no group."""
        return "=" in self.tap

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _read(value)
        if not isinstance(value, (Mapping, cls)):
            # pydantic reports no TypeError
            raise ValueError('expected text or a table { tap = "...", margin = ..., sample = ..., codec = "..." }')  # noqa: TRY004
        return value

    @field_validator("tap")
    @classmethod
    def _place_alone(cls, value: str) -> str:
        if _read(value) != {"tap": value}:
            raise ValueError("expected the place alone; margin, sample and codec are keys of their own")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tap == "logits" and (self.margin or self.codec):
            raise ValueError("expected neither margin nor codec with logits, which are f16, or f32 with f32 maps")
        if self.tap == "logits" and self.sample:
            raise ValueError("expected no sample with logits, which are compared whole")
        return self

    @model_serializer
    def _as_text(self) -> str:
        # recipes are compared as JSON: both forms are one, and runs of before tables are continued
        share = f"{_SHARE}{self.sample!r}" if self.sample else ""
        return f"{self.tap}{_MARGIN if self.margin else ''}{share}{f':{self.codec}' if self.codec else ''}"


def _read(text: str) -> dict[str, Any]:
    """The text as a table: ``tap`` and, where they are said, ``margin``, ``sample`` and ``codec``.

    Raises:
        ValueError: another order, no number after @, or no such codec.
    """
    rest, colon, last = text.rpartition(":")
    found: dict[str, Any] = {"codec": last} if colon and last in _CODECS else {}
    place, sampled, share = (rest if found else text).partition(_SHARE)
    if sampled:
        try:
            found["sample"] = float(share)
        except ValueError:
            raise ValueError(f"expected a share above 0 and below 1 after {_SHARE}, then : and the codec") from None
    if place.endswith(_MARGIN):
        found["margin"] = True
        place = place.removesuffix(_MARGIN)
    if not place or _MARGIN in place or ("=" not in place and ":" in place):
        raise ValueError(
            f"expected a group or name=module.path, then {_MARGIN}, then {_SHARE} and a share, then : and one of "
            f"{', '.join(_CODECS)}, each of the three where it is wanted"
        )
    return {"tap": place, **found}
