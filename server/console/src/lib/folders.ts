// Files that people drop or choose, and the PEFT adapters that are among them.

/** `path` begins with the folder that was dropped or chosen; a file that came alone has its name. */
export type Found = {
  path: string;
  file: File | null; // null: no part of an adapter, it was not opened
};

export type Candidate = {
  folder: string; // path; "" of files that came without one
  name: string; // that the adapter could have; may be ""
  parts: [part: string, path: string, file: File][]; // of the form of PUT /v1/adapters/{name}
  missing: string[]; // names of files that it cannot do without
  unused: string[]; // names of files beside its own that no part of the form is for
};

// path in the adapter's folder → part of the form; of two for one part the first counts
const PARTS: Record<string, string> = {
  "adapter_config.json": "config",
  "mixlora_config.json": "config",
  "adapter_model.safetensors": "weights",
  "chat_template.jinja": "chat_template",
  "card.json": "card",
  "config.json": "config.json",
  "modules.json": "modules.json",
  "1_Pooling/config.json": "1_Pooling/config.json",
};
const CONFIGS = Object.keys(PARTS).filter((path) => PARTS[path] === "config");
const NEEDED = { config: "adapter_config.json", weights: "adapter_model.safetensors" };
const MOST_FILES = 10_000; // of a drop: more is a whole disk, or a link that leads back

const nameOf = (path: string) => path.slice(path.lastIndexOf("/") + 1);
const folderOf = (path: string) => path.slice(0, Math.max(0, path.lastIndexOf("/")));

/** Every file of the dropped folders, at any depth. Throws if there are too many, or one cannot be read. */
export async function dropped(transfer: DataTransfer): Promise<Found[]> {
  const found: Found[] = [];
  const entries: FileSystemEntry[] = [];
  // All before the first wait: the browser takes the list away when the event is over.
  for (const item of transfer.items) {
    const entry = item.webkitGetAsEntry();
    const file = entry ? null : item.getAsFile(); // of a page, not of a disk: it has no entry
    if (entry) entries.push(entry);
    else if (file) found.push({ path: file.name, file });
  }
  for (let next = entries.shift(); next; next = entries.shift()) {
    if (isFolder(next)) {
      entries.push(...(await entriesOf(next)));
    } else {
      found.push({ path: next.fullPath.slice(1), file: isPart(next.name) ? await fileOf(next) : null });
    }
    if (found.length + entries.length > MOST_FILES) {
      throw new Error(`There are more than ${MOST_FILES} files in what was dropped. Drop the adapter's own folder.`);
    }
  }
  return found;
}

/** Of an input, which has walked the folder itself. */
export function chosen(files: Iterable<File>): Found[] {
  return [...files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

/** A folder with a config is one; files without a folder become one, whatever they are. */
export function adaptersIn(found: Found[]): Candidate[] {
  const configs = found.filter(({ path }) => CONFIGS.includes(nameOf(path)));
  const folders = new Set(configs.map(({ path }) => folderOf(path)));
  if (!folders.size && found.some(({ path }) => !folderOf(path))) folders.add("");
  return [...folders]
    .sort((one, other) => one.localeCompare(other, "en", { numeric: true })) // checkpoint-20 before -100
    .map((folder) => candidate(folder, found));
}

function candidate(folder: string, found: Found[]): Candidate {
  const start = folder && `${folder}/`;
  const files = new Map(found.map((one) => [one.path, one.file]));
  const parts = new Map<string, [path: string, file: File]>();
  for (const [path, part] of Object.entries(PARTS)) {
    const file = files.get(start + path);
    if (file && !parts.has(part)) parts.set(part, [path, file]);
  }
  const used = new Set([...parts.values()].map(([path]) => start + path));
  return {
    folder,
    name: nameFor(folder),
    parts: [...parts].map(([part, [path, file]]) => [part, path, file]),
    missing: Object.entries(NEEDED).flatMap(([part, file]) => (parts.has(part) ? [] : [file])),
    unused: found
      .flatMap(({ path }) => (folderOf(path) === folder && !used.has(path) ? [nameOf(path)] : []))
      .sort(),
  };
}

/** `support/checkpoint-500` → `support-checkpoint-500`: the number alone would say nothing. */
function nameFor(folder: string): string {
  const [parent, last = ""] = ["", ...folder.split("/")].slice(-2);
  const said = parent && /^checkpoint-\d+$/.test(last) ? `${parent}-${last}` : last;
  return said.replaceAll(/[^A-Za-z0-9._-]/g, "-").replace(/^[^A-Za-z0-9]+/, "");
}

function isPart(name: string): boolean {
  return Object.keys(PARTS).some((path) => nameOf(path) === name);
}

function isFolder(entry: FileSystemEntry): entry is FileSystemDirectoryEntry {
  return entry.isDirectory;
}

/** A reader gives a hundred at a time, and none when it is done. */
async function entriesOf(folder: FileSystemDirectoryEntry): Promise<FileSystemEntry[]> {
  const reader = folder.createReader();
  const all: FileSystemEntry[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return all;
    all.push(...some);
  }
}

function fileOf(entry: FileSystemEntry): Promise<File> {
  return new Promise((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
}
