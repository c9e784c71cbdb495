// What this server was started with and what our key may do, known once it has answered.

import { get, type Version } from "./api";

const NOTHING: Version["features"] = {
  generate: false,
  learn: false,
  train: false,
  route: false,
  cluster: false,
  images: false,
  guide: false,
};

class Server {
  features = $state(NOTHING);
  mayChange = $state(false); // whether this key may add, change and remove adapters
  seesAll = $state(false); // whether it may see what all adapters and tenants do

  async look(): Promise<void> {
    const told = await get<Version>("/version");
    this.features = told.features;
    this.mayChange = told.may_change;
    this.seesAll = told.sees_all;
  }
}

export const server = new Server();
