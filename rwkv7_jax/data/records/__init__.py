"""Parsing of data set records, such as lines of JSON, into documents."""
