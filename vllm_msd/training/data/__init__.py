"""Training data: conversations on disk, rendered as a target reads them.

`records` knows the formats, `index` finds records in large files, `render` makes token ids with the
reply tokens marked, `plan` says which record comes when, `batches` puts all of it together.
"""
