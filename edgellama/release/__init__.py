"""Release of a bundle: signatures, bill of materials, and updates that carry only the changes."""
