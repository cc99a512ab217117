"""The demo's HTML report: one file, images inside, nothing fetched."""
