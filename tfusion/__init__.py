"""tfusion: pretrain one transformer on text and images. Importing it touches no device."""

__version__ = "0.1.0"
