"""The predictions of the table: their items and the conditions under which they change."""
