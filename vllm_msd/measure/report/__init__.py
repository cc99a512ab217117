"""What report pages share: style, bars, tiles, tables. Self-contained HTML, nothing is fetched."""
