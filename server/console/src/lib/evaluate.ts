// Questions with answers from a JSONL file, and how often somebody answers them rightly.

export type Row = { prompt: string; answer: string };

/** The rows of a file: {"prompt", "answer"} or a chat on each line. Throws with the line's number. */
export function rowsOf(text: string): Row[] {
  const lines = text.split("\n").map((line, i) => [line.trim(), i + 1] as const);
  return lines.filter(([line]) => line).map(([line, number]) => row(line, number));
}

function row(line: string, number: number): Row {
  let read: Record<string, unknown>;
  try {
    read = JSON.parse(line) as Record<string, unknown>;
  } catch (error) {
    throw new Error(`line ${number}: ${(error as Error).message}`);
  }
  const messages = read.messages as { role: string; content: unknown }[] | undefined;
  const [prompt, answer] = Array.isArray(messages)
    ? [messages.at(-2)?.content, messages.at(-1)?.content]
    : [read.prompt, read.answer];
  if (typeof prompt !== "string" || typeof answer !== "string" || (messages?.length ?? 2) !== 2) {
    throw new Error(`line ${number}: {"prompt": "…", "answer": "…"} or a chat of two messages is needed`);
  }
  return { prompt, answer };
}

/** Whether an answer is right, but for case and spaces, as `loraplex eval` decides. */
export function isRight(metric: "exact" | "contains", answer: string, expected: string): boolean {
  const [given, wanted] = [plain(answer), plain(expected)];
  return metric === "exact" ? given === wanted : given.includes(wanted);
}

function plain(text: string): string {
  return text.toLowerCase().split(/\s+/).filter(Boolean).join(" ");
}
