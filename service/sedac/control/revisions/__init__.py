"""What the policy was and is: its revisions, as the database keeps them."""
