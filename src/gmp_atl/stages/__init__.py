"""One module per rule, each with one public function of the same name: settings and paths in, files out."""
