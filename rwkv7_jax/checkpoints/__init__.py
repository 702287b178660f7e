"""Names, shapes and layouts of every file format, read safely and written atomically.

The only room that knows what a file is called inside.
"""
