// Everything that goes to the server: JSON calls, event streams, and the key.

import type { components } from "./openapi";

type Schemas = components["schemas"];
export type Adapter = Schemas["Adapter"];
export type ClusterAnswer = Schemas["ClusterAnswer"];
export type Cluster = NonNullable<ClusterAnswer["cluster"]>;
export type Call = Schemas["Call"];
export type Job = Schemas["JobShown"];
export type Live = Schemas["Live"];
export type Version = Schemas["Version"];
export type RequestList = Schemas["RequestList"];
export type Revision = Schemas["RevisionList"]["data"][number];

/** What the server said, in its own words. */
export class ServerError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string,
    readonly details: Record<string, unknown> = {}, // further fields of the error, which explain it
  ) {
    super(message);
  }
}

const KEY = "loraplex-key";
const UNREACHABLE = "the server does not answer: is it running, and can this machine reach it?";

export function storedKey(): string {
  return sessionStorage.getItem(KEY) ?? "";
}

export function storeKey(key: string): void {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function headers(json: boolean): Record<string, string> {
  const key = storedKey();
  return {
    ...(json ? { "content-type": "application/json" } : {}),
    ...(key ? { authorization: `Bearer ${key}` } : {}),
  };
}

async function failure(answer: Response): Promise<ServerError> {
  const text = await answer.text();
  try {
    const { error } = JSON.parse(text) as { error: { message: string; code: string } };
    return new ServerError(answer.status, error.message, error.code, error);
  } catch {
    return new ServerError(answer.status, text || answer.statusText, String(answer.status));
  }
}

async function send(path: string, init: RequestInit): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ServerError(0, UNREACHABLE, "unreachable");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

export async function get<T>(path: string): Promise<T> {
  return (await (await send(path, { headers: headers(false) })).json()) as T;
}

/** `method`: POST, PATCH or DELETE. */
export async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
  const answer = await send(path, {
    method,
    headers: headers(true),
    body: body === undefined ? null : JSON.stringify(body),
  });
  return (await answer.json()) as T;
}

/** The data of each event until the stream ends. Throws if it breaks off. */
export async function* events<T>(
  path: string,
  init: { body?: unknown; signal?: AbortSignal } = {},
): AsyncGenerator<T> {
  const posts = init.body !== undefined;
  const answer = await send(path, {
    method: posts ? "POST" : "GET",
    headers: headers(posts),
    body: posts ? JSON.stringify(init.body) : null,
    signal: init.signal ?? null,
  });
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let chunk: ReadableStreamReadResult<string>;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ServerError(0, "the stream broke off", "broken_stream");
    }
    if (chunk.done) throw new ServerError(0, "the stream broke off", "broken_stream");
    const blocks = (rest + chunk.value).split("\n\n");
    rest = blocks.pop()!;
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice(6);
      if (data === "[DONE]") return;
      const { error, id } = JSON.parse(data) as { error?: { message: string; code: string }; id?: string };
      // A job's error is a value like others; one without an id ends the stream.
      if (error && id === undefined) throw new ServerError(200, error.message, error.code);
      yield JSON.parse(data) as Awaited<T>;
    }
  }
}

/** Uploads a form and tells how much of it has gone, 0 to 1. */
export function upload<T>(
  path: string,
  form: FormData,
  onProgress: (share: number) => void,
): { answer: Promise<T>; cancel: () => void } {
  const request = new XMLHttpRequest();
  const answer = new Promise<T>((resolve, reject) => {
    request.open("PUT", path);
    for (const [name, value] of Object.entries(headers(false))) {
      request.setRequestHeader(name, value);
    }
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onload = async () => {
      const answer = new Response(request.responseText, { status: request.status });
      if (answer.ok) resolve((await answer.json()) as T);
      else reject(await failure(answer));
    };
    request.onerror = () => reject(new ServerError(0, UNREACHABLE, "unreachable"));
    request.onabort = () => reject(new ServerError(0, "cancelled", "cancelled"));
    request.send(form);
  });
  return { answer, cancel: () => request.abort() };
}
