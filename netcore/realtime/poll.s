// This file lets the package declare functions whose bodies are in the runtime.
