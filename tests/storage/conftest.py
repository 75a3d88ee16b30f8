"""The S3 server, for the tests of this folder."""

from s3_server import s3, s3_server  # noqa: F401
