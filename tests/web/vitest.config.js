import { defineConfig } from "vitest/config";

export default defineConfig({ test: { include: ["*.test.js"], watch: false }, server: { fs: { allow: ["../.."] } } });
