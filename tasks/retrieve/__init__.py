"""The engine of a retrieval: find studies, fetch them, send each on as soon as it is whole. Drivers don't import it."""
