"""Files: uploads, the outputs bucket, and the links to both."""
