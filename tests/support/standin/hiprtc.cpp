// The functions of libhiprtc that fomoe calls: g++ is the compiler, a shared library the code.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "hip_types.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

// f16 conversion and fma are instructions of x86-64-v3; a*b+c may be fused, as on a GPU.
const char* const kCompile = "g++ -std=gnu++17 -march=x86-64-v3 -fno-strict-aliasing -w ";

struct Program {
  std::string source, log, code;
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool shell(const std::string& command) {
  const int status = system(command.c_str());
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// The names of the kernels that are left after preprocessing, from `annotate("fm_kernel"))) void
// NAME(`.
std::vector<std::string> kernels(const std::string& preprocessed) {
  const std::string mark = "annotate(\"fm_kernel\")))";
  std::vector<std::string> names;
  for (size_t at = 0; (at = preprocessed.find(mark, at)) != std::string::npos;) {
    at += mark.size();
    const size_t open = preprocessed.find('(', at);
    std::istringstream words(preprocessed.substr(at, open - at));
    std::string type, name;
    if (words >> type >> name && type == "void") names.push_back(name);
  }
  return names;
}

// Entry points for every kernel.
std::string entry_points(const std::string& preprocessed) {
  const std::string visible = "__attribute__((visibility(\"default\"))) ";
  std::string text =
      "\nextern \"C\" {\n"
      "__attribute__((section(\"fm_shared\"), used)) static char fm_shared_first[16];\n"
      "extern unsigned char __start_fm_shared[], __stop_fm_shared[];\n" +
      visible +
      "void fm_shared_range(unsigned char** b, unsigned char** e) { *b = __start_fm_shared; *e = "
      "__stop_fm_shared; }\n";
  for (const std::string& name : kernels(preprocessed)) {
    text += visible + "void fm_call_" + name + "(void** p) { fm_cpu::call(&" + name + ", p); }\n";
    text += visible + "unsigned fm_sizes_" + name + "(unsigned* out) { return fm_cpu::sizes(&" +
            name + ", out); }\n";
  }
  return text + "}\n";
}

bool compile(Program& program, const std::string& folder, const std::string& options) {
  const std::string log = " 2>> " + folder + "/log";
  std::ofstream(folder + "/k.cpp") << program.source;
  if (!shell(kCompile + options + "-E " + folder + "/k.cpp -o " + folder + "/k.ii" + log))
    return false;
  const std::string entries = entry_points(read_file(folder + "/k.ii"));
  std::ofstream(folder + "/k.ii", std::ios::app) << entries;
  // A kernel runs for milliseconds here: what counts is how long it takes to compile.
  return shell(kCompile + std::string("-Og -fpreprocessed -shared -fPIC -fvisibility=hidden ") +
               folder + "/k.ii -o " + folder + "/k.so" + log);
}

}  // namespace

API hiprtcResult hiprtcVersion(int* major, int* minor) {
  return *major = 0, *minor = STANDIN_VERSION, HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcCreateProgram(void** program, const char* source, const char*, int,
                                     const char* const*, const char* const*) {
  return *program = new Program{source, "", ""}, HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcDestroyProgram(void** program) {
  delete static_cast<Program*>(*program);
  return *program = nullptr, HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcCompileProgram(void* handle, int n, const char* const* options) {
  auto& program = *static_cast<Program*>(handle);
  std::string defines;
  for (int i = 0; i < n; i++)
    if (strncmp(options[i], "-D", 2) == 0) defines += std::string(options[i]) + " ";
  char folder[] = "/tmp/fomoe_hiprtc_XXXXXX";
  if (!mkdtemp(folder)) return HIPRTC_ERROR_COMPILATION;
  const bool good = compile(program, folder, defines);
  program.log = read_file(folder + std::string("/log"));
  program.code = good ? read_file(folder + std::string("/k.so")) : "";
  shell("rm -rf " + std::string(folder));
  return good ? HIPRTC_SUCCESS : HIPRTC_ERROR_COMPILATION;
}
API hiprtcResult hiprtcGetProgramLogSize(void* program, size_t* bytes) {
  return *bytes = static_cast<Program*>(program)->log.size() + 1, HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcGetProgramLog(void* program, char* out) {
  return strcpy(out, static_cast<Program*>(program)->log.c_str()), HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcGetCodeSize(void* program, size_t* bytes) {
  return *bytes = static_cast<Program*>(program)->code.size(), HIPRTC_SUCCESS;
}
API hiprtcResult hiprtcGetCode(void* program, char* out) {
  const std::string& code = static_cast<Program*>(program)->code;
  return memcpy(out, code.data(), code.size()), HIPRTC_SUCCESS;
}
API const char* hiprtcGetErrorString(hiprtcResult result) {
  return result == HIPRTC_SUCCESS ? "no error" : "compilation failed";
}
