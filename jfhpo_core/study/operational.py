"""Fields of a study file that do not change what a run comes to: where and how fast it runs, what is compared with it.

They may change when a study is continued; all other fields give its trials their meaning. A field says itself which it
is: `Field(..., json_schema_extra=OPERATIONAL)`. Trainers of other packages do so in the model that they name in
`Trainer.settings`.
"""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel
from pydantic.config import JsonDict

OPERATIONAL: JsonDict = {"operational": True}
"""`json_schema_extra` of such a field; `jfhpo schema` shows it."""


@cache
def operational_fields(kind: type[BaseModel]) -> frozenset[str]:
    """Names of the operational fields of a model."""
    return frozenset(
        name
        for name, field in kind.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
    )
