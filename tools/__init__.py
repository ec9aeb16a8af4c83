"""What makes the repository's bundled files, and is no part of the package."""
