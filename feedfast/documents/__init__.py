"""What the functions of `feedfast` return: the JSON document of each command as a frozen dataclass."""

from feedfast.documents.base import Document, document_of
from feedfast.documents.caches import (
    CacheDocument,
    CopyDocument,
    FactorsDocument,
    InspectDocument,
    VerifyDocument,
)
from feedfast.documents.lists import (
    DoctorDocument,
    MethodDocument,
    MethodsDocument,
    RecipeDocument,
    RecipesDocument,
    TapsDocument,
)
from feedfast.documents.plans import PlanDocument
from feedfast.documents.runs import (
    ChainDocument,
    CompareDocument,
    DemoDocument,
    ExportDocument,
    ReconstructionDocument,
    SweepDocument,
    TrainDocument,
)

__all__ = [
    "CacheDocument",
    "ChainDocument",
    "CompareDocument",
    "CopyDocument",
    "DemoDocument",
    "DoctorDocument",
    "Document",
    "ExportDocument",
    "FactorsDocument",
    "InspectDocument",
    "MethodDocument",
    "MethodsDocument",
    "PlanDocument",
    "RecipeDocument",
    "RecipesDocument",
    "ReconstructionDocument",
    "SweepDocument",
    "TapsDocument",
    "TrainDocument",
    "VerifyDocument",
    "document_of",
]
