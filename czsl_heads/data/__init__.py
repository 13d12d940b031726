"""Data sets in the field's layout: reader, check, import, split, the shapes world; and which pairs can be."""

from czsl_heads.data.feasibility_files import read_feasibility as read_feasibility
from czsl_heads.data.feasibility_files import read_word_vectors as read_word_vectors
from czsl_heads.data.images import open_image as open_image
from czsl_heads.data.importing import import_dataset as import_dataset
from czsl_heads.data.integrity import check as check
from czsl_heads.data.layout import CompositionDataset as CompositionDataset
from czsl_heads.data.layout import DataError as DataError
from czsl_heads.data.layout import read_dataset as read_dataset
from czsl_heads.data.shapes import make_shapes as make_shapes
from czsl_heads.data.splitting import split_dataset as split_dataset

__all__ = [
    "CompositionDataset",
    "DataError",
    "check",
    "import_dataset",
    "make_shapes",
    "open_image",
    "read_dataset",
    "read_feasibility",
    "read_word_vectors",
    "split_dataset",
]
