/**
 * Outputs of models, whatever they are: pictures, video, audio, text, JSON.
 *
 * A model is a stranger. Its files are only shown by elements that run nothing (an SVG in `img` runs no script), from
 * this stack's own hosts; everything else is text.
 */

import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { OutputFile } from "./api";
import { bytes, json } from "./format";

type Kind = "image" | "video" | "audio" | "file";

const BY_ENDING: Record<string, Kind> = {
  png: "image", jpg: "image", jpeg: "image", webp: "image", gif: "image", avif: "image", svg: "image",
  mp4: "video", webm: "video", mov: "video",
  mp3: "audio", wav: "audio", ogg: "audio", flac: "audio", m4a: "audio",
};

function kindOf(url: string, type: string | undefined): Kind {
  const major = type?.split("/", 1)[0];
  if (major === "image" || major === "video" || major === "audio") return major;
  const ending = /\.([a-z0-9]{2,4})$/i.exec(new URL(url).pathname)?.[1]?.toLowerCase();
  return (ending && BY_ENDING[ending]) || "file";
}

export function isLink(value: unknown): value is string {
  return typeof value === "string" && /^https?:\/\/[^\s]+$/.test(value) && URL.canParse(value);
}

/** All links of an output, in their order. */
export function linksOf(output: unknown): string[] {
  if (isLink(output)) return [output];
  if (Array.isArray(output)) return output.flatMap(linksOf);
  if (output !== null && typeof output === "object") return Object.values(output).flatMap(linksOf);
  return [];
}

function typeOf(url: string, files: OutputFile[]): string | undefined {
  const path = decodeURIComponent(new URL(url).pathname);
  return files.find((file) => file.key && path.endsWith(file.key))?.content_type;
}

export function MediaFile({ url, files, alt }: { url: string; files: OutputFile[]; alt: string }): JSX.Element {
  const [broken, setBroken] = useState(false);
  const kind = kindOf(url, typeOf(url, files));
  const link = (
    <a href={url} target="_blank" rel="noreferrer noopener" download>
      {new URL(url).pathname.split("/").pop() || "file"}
    </a>
  );
  if (broken || kind === "file") return <p class="file">{link}</p>;
  if (kind === "image") return <img src={url} alt={alt} loading="lazy" onError={() => setBroken(true)} />;
  if (kind === "video") return <video src={url} controls preload="metadata" aria-label={alt} onError={() => setBroken(true)} />;
  return <audio src={url} controls preload="none" aria-label={alt} onError={() => setBroken(true)} />;
}

/** The text of an output: language models return it in pieces. */
export function textOf(output: unknown): string | null {
  if (typeof output === "string" && !isLink(output)) return output;
  if (Array.isArray(output) && output.length > 0 && output.every((each) => typeof each === "string" && !isLink(each))) {
    return output.join("");
  }
  return null;
}

export function Output({ output, files, alt }: { output: unknown; files: OutputFile[]; alt: string }): JSX.Element | null {
  if (output === null || output === undefined) return null;
  const text = textOf(output);
  if (text !== null) return <p class="text">{text}</p>;
  const links = linksOf(output);
  return (
    <>
      {links.length > 0 && (
        <div class="media">
          {links.map((url, n) => (
            <MediaFile key={url} url={url} files={files} alt={links.length > 1 ? `${alt}, file ${n + 1}` : alt} />
          ))}
        </div>
      )}
      {(links.length === 0 || !(isLink(output) || (Array.isArray(output) && output.every(isLink)))) && (
        <pre tabIndex={0}>{json(output)}</pre>
      )}
    </>
  );
}

export function Files({ files }: { files: OutputFile[] }): JSX.Element | null {
  if (files.length === 0) return null;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Output files">
      <table>
        <thead>
          <tr>
            <th scope="col">File</th>
            <th scope="col">Type</th>
            <th scope="col">Size</th>
            <th scope="col">SHA-256</th>
          </tr>
        </thead>
        <tbody>
          {files.map((file) => (
            <tr key={file.path}>
              <td>
                <code>{file.key ?? file.path}</code>
              </td>
              <td>{file.error ?? file.content_type}</td>
              <td>{file.bytes === undefined ? "" : bytes(file.bytes)}</td>
              <td>
                <code title={file.sha256}>{file.sha256?.slice(0, 16)}</code>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
