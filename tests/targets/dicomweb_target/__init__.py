"""DICOMweb targets: fields, authorization, TLS, check."""
