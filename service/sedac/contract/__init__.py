"""The contract with the wire: the generated code of proto/ (v1), its plain Python forms, and what turns one into the other."""
