"""An OpenAI-compatible server whose answers check themselves: `protocol` reads and writes, `batch` decodes."""
