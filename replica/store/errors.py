"""What goes wrong with models on disk."""


class StoreError(Exception):
    """A model cannot be fetched, read or written; the message says why and what to do."""
