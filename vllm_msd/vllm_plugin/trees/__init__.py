"""What both model runners share about draft trees."""
