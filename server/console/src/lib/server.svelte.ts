// What this server was started with, known once it has answered.

import { get, type Version } from "./api";

const NOTHING: Version["features"] = {
  generate: false,
  learn: false,
  train: false,
  route: false,
  cluster: false,
  guide: false,
};

class Server {
  features = $state(NOTHING);

  async look(): Promise<void> {
    this.features = (await get<Version>("/version")).features;
  }
}

export const server = new Server();
