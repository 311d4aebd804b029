"""The error of the model store."""


class StoreError(Exception):
    """A model cannot be fetched, read or written; the message says why and what to do."""
