// One column of the playground: who answers, and the answer as it comes.

import { events } from "./api";

export type Part = { name: string; weight: number };
export type Who =
  | { kind: "base" }
  | { kind: "auto" }
  | { kind: "adapter"; name: string }
  | { kind: "mixture"; parts: Part[] };

export type Message = { role: string; content: unknown };
export type Settings = {
  prompt: string;
  images: string[]; // data: URLs, before the text
  followUp: boolean; // the answers shown are turns before the prompt
  system: string;
  temperature: number;
  maxTokens: number;
  topP: number;
  seed: string;
  schema: string;
  tools: string;
  logprobs: boolean;
};

export const DEFAULTS: Settings = {
  prompt: "",
  images: [],
  followUp: false,
  system: "",
  temperature: 0,
  maxTokens: 64,
  topP: 1,
  seed: "",
  schema: "",
  tools: "",
  logprobs: false,
};

const N_LIKELY = 3; // tokens that are told beside the chosen one

type Likely = { token: string; logprob: number };
export type Token = Likely & { bytes: number[]; top_logprobs?: Likely[] };
type Marked = { token: Token; part: string }; // and the part of the answer that it made
type Candidate = { name: string; score: number };
type Routing = { candidates?: Candidate[]; threshold?: number; margin?: number };
type Chunk = {
  choices: {
    delta: {
      content?: string | null;
      reasoning_content?: string | null;
      tool_calls?: { function?: { arguments?: string; name?: string } }[];
    };
    logprobs?: { content?: Token[] } | null;
    finish_reason: string | null;
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number } | null;
  adapter?: { name: string | null; chosen_by?: Routing } | null;
};

/** The body of the request, as curl and Python would send it. Throws if JSON does not parse. */
export function body(lane: Lane, model: string, settings: Settings): Record<string, unknown> {
  const { who } = lane;
  const messages = [
    ...(settings.system ? [{ role: "system", content: settings.system }] : []),
    ...(settings.followUp ? lane.history : []),
    userMessage(settings),
  ];
  return {
    model,
    messages,
    ...adapterOf(who),
    temperature: settings.temperature,
    max_tokens: settings.maxTokens,
    ...(settings.topP < 1 ? { top_p: settings.topP } : {}),
    ...(settings.seed ? { seed: Number(settings.seed) } : {}),
    ...(settings.logprobs ? { logprobs: true, top_logprobs: N_LIKELY } : {}),
    ...(settings.schema
      ? { response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed(settings.schema, "JSON schema") } } }
      : {}),
    ...(settings.tools ? { tools: parsed(settings.tools, "tools") } : {}),
  };
}

function userMessage({ prompt, images }: Settings): Message {
  if (!images.length) return { role: "user", content: prompt };
  const shown = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...shown, { type: "text", text: prompt }] };
}

/** The text of a message, without its images. */
export function textOf({ content }: Message): string {
  if (!Array.isArray(content)) return String(content);
  return content.map((part: { text?: string }) => part.text ?? "").join("");
}

function adapterOf(who: Who): { adapter?: unknown } {
  switch (who.kind) {
    case "base":
      return {};
    case "auto":
      return { adapter: "auto" };
    case "adapter":
      return { adapter: who.name };
    case "mixture":
      return { adapter: who.parts };
  }
}

function parsed(text: string, what: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what}: ${(error as Error).message}`);
  }
}

export class Lane {
  who = $state<Who>({ kind: "base" });
  reasoning = $state(""); // before the text
  text = $state("");
  #tokens = $state<Marked[]>([]); // all that were generated: markers and the end token, too
  marked = $derived.by(() => this.#ofText());
  error = $state<unknown>(null);
  running = $state(false);
  firstTokenMs = $state<number | null>(null);
  tokensPerS = $state<number | null>(null);
  nTokens = $state(0);
  finish = $state<string | null>(null);
  answered = $state<string | null>(null); // the adapter that answered
  routing = $state<Routing | null>(null);
  before = $state<Message[]>([]); // turns before the answer that is shown, without the system prompt
  history = $state<Message[]>([]); // these turns, and the last ones if they were answered
  #abort: AbortController | null = null;

  get title(): string {
    if (this.who.kind === "adapter") return this.who.name;
    return this.who.kind === "base" ? "the base" : this.who.kind;
  }

  constructor(who: Who) {
    this.who = who;
  }

  stop(): void {
    this.#abort?.abort();
  }

  /** The tokens of the text. A call is shown otherwise than it was written: then all after the reasoning. */
  #ofText(): Marked[] {
    const { text, reasoning } = this;
    const all = this.#tokens.map(({ part }) => part).join("");
    const begin = reasoning ? Math.max(0, all.indexOf(reasoning)) + reasoning.length : 0;
    // From the end after reasoning: the marker behind it may have the letters of a short text.
    const found = reasoning ? all.lastIndexOf(text) : all.indexOf(text);
    const [start, end] = found < begin ? [begin, all.length] : [found, found + text.length];
    let at = 0;
    return this.#tokens.flatMap(({ token, part }) => {
      const shown = part.slice(Math.max(0, start - at), Math.max(0, end - at));
      at += part.length;
      return shown ? [{ token, part: shown }] : [];
    });
  }

  async run(model: string, settings: Settings): Promise<void> {
    const request = { ...body(this, model, settings), stream: true, stream_options: { include_usage: true } };
    this.before = settings.followUp ? this.history : [];
    this.history = this.before;
    this.reasoning = this.text = "";
    this.#tokens = [];
    this.error = this.firstTokenMs = this.tokensPerS = null;
    this.finish = this.answered = this.routing = null;
    this.nTokens = 0;
    this.running = true;
    this.#abort = new AbortController();
    const started = performance.now();
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // a character may take several tokens
    let first = 0;
    try {
      const stream = events<Chunk>("/v1/chat/completions", {
        body: request,
        signal: this.#abort.signal,
      });
      for await (const chunk of stream) {
        if (chunk.adapter) {
          this.answered = chunk.adapter.name;
          this.routing = chunk.adapter.chosen_by ?? this.routing;
        }

        const choice = chunk.choices[0];
        const thought = choice?.delta.reasoning_content ?? "";
        const piece = choice?.delta.content ?? calls(choice);
        if (!first && (thought || piece)) {
          first = performance.now();
          this.firstTokenMs = first - started;
        }
        this.reasoning += thought;
        this.text += piece;
        for (const token of choice?.logprobs?.content ?? []) {
          const part = decoder.decode(Uint8Array.from(token.bytes), { stream: true });
          this.#tokens.push({ token, part });
        }
        if (choice?.finish_reason) this.finish = choice.finish_reason;
        if (chunk.usage) this.nTokens = chunk.usage.completion_tokens;
      }
      this.history = [...this.before, userMessage(settings), { role: "assistant", content: this.text }];
      const spent = (performance.now() - first) / 1000;
      if (first && this.nTokens > 1 && spent > 0) this.tokensPerS = (this.nTokens - 1) / spent;
    } catch (error) {
      if (this.#abort.signal.aborted) this.finish = "stopped";
      else this.error = error;
    } finally {
      this.running = false;
    }
  }
}

function calls(choice: Chunk["choices"][number] | undefined): string {
  const made = choice?.delta.tool_calls ?? [];
  return made
    .map(({ function: f }) => `${f?.name ? `\n→ ${f.name} ` : ""}${f?.arguments ?? ""}`)
    .join("");
}
