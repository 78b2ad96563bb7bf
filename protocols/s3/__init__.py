"""S3: objects, signatures, checksums, uploads in parts, and what stores say about an error. For `tasks/s3/`."""
