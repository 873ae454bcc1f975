"""The second embedded world: composed pictures, rich backgrounds, captions that do not always tell the truth."""
