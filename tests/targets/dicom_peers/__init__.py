"""C-STORE to scripted DICOM peers."""
