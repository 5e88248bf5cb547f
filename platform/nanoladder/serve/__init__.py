"""A checkpoint behind an OpenAI-compatible interface and a page of its own; several people talk at once (nanoladder serve)."""
