// A request of the playground as people send it without a browser.

import { storedKey } from "./api";

export function asCurl(body: Record<string, unknown>): string {
  const key = storedKey() ? ' -H "Authorization: Bearer $LORAPLEX_API_KEY"' : "";
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions${key} -H "Content-Type: application/json" -d '${quoted}'`;
}

export function asPython(body: Record<string, unknown>): string {
  const { adapter, ...known } = body;
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (adapter !== undefined) fields.push(`    extra_body={"adapter": ${literal(adapter)}},`);
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key="${storedKey() ? "YOUR-KEY" : "none"}")`,
    "answer = client.chat.completions.create(",
    ...fields,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

/** JSON is Python but for three words, which a text may hold, too. */
function literal(value: unknown): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value as object).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}
