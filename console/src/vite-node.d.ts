declare module "node:crypto" {
  export function createHash(name: string): { update(text: string): { digest(as: string): string } };
}
