"""Fast blocks and honest timing. Needs torch alone to import; a GPU only to run GPU code."""
