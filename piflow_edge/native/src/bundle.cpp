#include "bundle.h"

#include <filesystem>
#include <fstream>
#include <set>

#include "error.h"
#include "manifest.h"
#include "sha256.h"

namespace piflow {
namespace {

namespace fs = std::filesystem;

const char kManifest[] = "bundle.json", kSignature[] = "bundle.sig";
constexpr uint64_t kManifestLimit = 1 << 20;

// At most `limit` bytes and one more, which shows that the file is too long.
std::string read_file(const fs::path& path, uint64_t limit) {
  require(fs::symlink_status(path).type() == fs::file_type::regular,
          path.string() + " is missing, or a link; copy the bundle again or re-export");
  std::ifstream file(path, std::ios::binary);
  std::string data(size_t(std::min<uint64_t>(fs::file_size(path), limit + 1)), '\0');
  file.read(data.data(), std::streamsize(data.size()));
  require(bool(file), path.string() + " cannot be read");
  return data;
}

}  // namespace

Bundle::Bundle(const std::string& folder, const std::string& expected) : folder_(folder) {
  require(fs::is_directory(folder), "a bundle is a folder; there is none at " + folder);
  const std::string data = read_file(fs::u8path(folder) / kManifest, kManifestLimit);
  require(data.size() <= kManifestLimit, "bundle.json is larger than 1 MiB");
  if (!expected.empty()) {
    const std::string digest = sha256(data);
    require(digest == expected, "bundle.json has SHA-256 " + digest + ", not the " + expected + " that was asked for");
  }
  manifest_ = parse_manifest(data);
  check_listing();
  for (const auto& [name, spec] : manifest_.files) read(name);
}

void Bundle::check_listing() const {
  std::set<std::string> missing = {kManifest};
  for (const auto& [name, spec] : manifest_.files) missing.insert(name);
  const std::string again = "; copy the bundle again or re-export";
  for (const auto& entry : fs::directory_iterator(fs::u8path(folder_))) {
    const std::string name = entry.path().filename().u8string();
    require(name == kSignature || missing.erase(name), name + " does not belong to the bundle in " + folder_ + again);
  }
  require(missing.empty(), (missing.empty() ? "" : *missing.begin()) + " is missing in the bundle in " + folder_ + again);
}

std::string Bundle::read(const std::string& name) const {
  const auto spec = manifest_.files.find(name);
  require(spec != manifest_.files.end(), "the bundle does not list " + name + "; re-export");
  std::string data = read_file(fs::u8path(folder_) / fs::u8path(name), spec->second.size);
  require(data.size() == spec->second.size && sha256(data) == spec->second.sha256,
          name + " in " + folder_ + " does not match its checksum in bundle.json; copy it again or re-export");
  return data;
}

}  // namespace piflow
