"""Records of data sets, such as lines of JSON, as documents."""
