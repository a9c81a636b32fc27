"""Try it on one machine: private servers, realistic events, the demo and the development stack."""
