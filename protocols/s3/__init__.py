"""S3: objects, signatures, checksums, uploads in parts, and what stores say of an error."""
