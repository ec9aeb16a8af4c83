"""The bundled model, with an example of each modality."""
