"""GLSL of the pyrender renderer: the same light and alpha policy as lights.py and primitives.py."""

from __future__ import annotations

from data_prep.renderers.lights import MAX_LIGHTS

VERTEX = """#version 330 core
layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec2 texcoord_0;
layout(location = 3) in vec4 color_0;
layout(location = 4) in mat4 inst_m;
uniform mat4 V;
uniform mat4 P;
out vec3 at;
out vec3 smooth_normal;
out vec2 uv;
out vec4 tint;
void main() {
    gl_Position = P * V * vec4(position, 1.0);
    at = position;
    smooth_normal = normal;
    uv = texcoord_0;
    tint = color_0;
}
"""

FRAGMENT = f"""#version 330 core
in vec3 at;
in vec3 smooth_normal;
in vec2 uv;
in vec4 tint;
struct Material {{
    vec4 base_color_factor;
    sampler2D base_color_texture;
}};
uniform Material material;
uniform mat4 V;
uniform vec3 cam_pos;
uniform float cutoff;
uniform bool show_normals;
uniform vec3 ambient;
uniform vec3 head;
uniform int num_lights;
uniform vec4 light_places[{MAX_LIGHTS}];
uniform vec3 light_colors[{MAX_LIGHTS}];
out vec4 frag_color;
void main() {{
    vec3 side = cross(dFdx(at), dFdy(at));
    vec4 texel = texture(material.base_color_texture, uv);
    float alpha = textureLod(material.base_color_texture, uv, 0.0).a;
    if (cutoff > 0.0 && alpha * material.base_color_factor.a * tint.a < cutoff) discard;
    vec3 view = normalize(cam_pos - at);
    vec3 n = normalize(smooth_normal);
    if (dot(side, view) * dot(side, n) < 0.0) n = -n;
    if (show_normals) {{
        vec3 local = mat3(V) * n;
        frag_color = vec4(vec3(local.x, -local.y, -local.z) * 0.5 + 0.5, 1.0);
        return;
    }}
    vec3 light = ambient;
    for (int i = 0; i < num_lights; ++i) {{
        vec4 place = light_places[i];
        vec3 ray = place.w == 0.0 ? place.xyz : normalize(place.xyz - at);
        light += light_colors[i] * (0.5 + 0.5 * dot(n, ray));
    }}
    light += head * clamp(dot(n, view), 0.0, 1.0);
    frag_color = vec4(texel.rgb * material.base_color_factor.rgb * tint.rgb * light, 1.0);
}}
"""
