/** Texts for people: times, sizes and dollars. */

import type { Cost } from "./api";

export function ago(time: string, now = Date.now()): string {
  const seconds = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

export function seconds(from: string, to: string): string {
  const passed = (Date.parse(to) - Date.parse(from)) / 1000;
  return passed < 60 ? `${Math.max(0, passed).toFixed(1)} s` : `${Math.floor(passed / 60)} min ${Math.round(passed % 60)} s`;
}

export function moment(time: string): string {
  return new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

export function bytes(size: number): string {
  if (size < 1000) return `${size} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(size) / 3));
  return `${(size / 1000 ** power).toFixed(1)} ${["", "kB", "MB", "GB"][power]}`;
}

export function dollars(micro: number): string {
  return `$${(micro / 1e6).toFixed(micro !== 0 && Math.abs(micro) < 10_000 ? 6 : 2)}`;
}

/** An unknown cost is never shown as 0. */
export function costOf(cost: Cost | null | undefined): string {
  if (!cost) return "";
  return cost.micro_dollars === null ? "cost unknown" : dollars(cost.micro_dollars);
}

export function json(value: unknown): string {
  return JSON.stringify(value, null, 2) ?? "";
}
