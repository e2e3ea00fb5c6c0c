"""What every configuration has: frozen, strict, and identified by a digest."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from proxyrob.threat import Threat, parse_threat


def digest_of(content: Any) -> str:
    """The sha256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Config(BaseModel):
    """A frozen configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    REVISION: ClassVar[int] = 1
    """Raised whenever the same configuration comes to mean another result, so that no old result is taken for a new one."""

    MEANS: ClassVar[frozenset[str]] = frozenset()
    """Fields that say by what means a result is had, not what it is (where something lies, how much is held in memory):
    they are no part of the identity."""

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The values and the revisions of this configuration and of every part of it: what a digest is made of."""
        values = self.dump()
        for name in type(self).model_fields:
            match getattr(self, name):
                case Config() as part:
                    values[name] = part.identity()
                case tuple(parts) if any(isinstance(part, Config) for part in parts):
                    values[name] = [part.identity() for part in parts]
        return {"revision": self.REVISION, "values": {name: value for name, value in values.items() if name not in self.MEANS}}

    def digest(self) -> str:
        """The sha256 of the identity."""
        return digest_of(self.identity())

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, validated again."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _read_threat(value: Any) -> Any:
    return parse_threat(value) if isinstance(value, str) else value


ThreatField = Annotated[Threat, BeforeValidator(_read_threat), PlainSerializer(str)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
