"""What the functions of `feedfast` return: the JSON document of each command as a frozen dataclass."""

from feedfast.documents.base import Document, document_of
from feedfast.documents.caches import CacheDocument
from feedfast.documents.runs import TrainDocument

__all__ = ["CacheDocument", "Document", "TrainDocument", "document_of"]
